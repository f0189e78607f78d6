# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The error that quantizing one layer alone makes in a model's outputs, and the choice of layers that get more bits.

A layer's error is the mean absolute difference of the outputs from full precision, divided by their spread
(:func:`psaq_mm.calibration.discrepancy.normalized_l1`). Bits are chosen by it under a budget as in the mixed precision
of HAWQ (arXiv 1905.03696), with a measured error in place of a second-order estimate. The choice assumes that errors of
layers add up; the error of the whole model under the choice checks that.
"""

import contextlib
from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from psaq_mm.calibration.discrepancy import normalized_l1
from psaq_mm.contexts import hooked
from psaq_mm.errors import ConfigError
from psaq_mm.models.quantized import quantized_part
from psaq_mm.models.task import TaskModel
from psaq_mm.quantization import Override, Quantizer, QuantMatMul, QuantSpec, in_mode, quantizers

__all__ = [
    'Choice',
    'LayerError',
    'choose_bits',
    'layer_quantizers',
    'mean_error',
    'measure_layers',
    'only_quantized',
    'outputs_to_compare',
    'with_overrides',
]

_OF_A_LAYER = ('input_quantizer', 'weight_quantizer', 'lhs_quantizer', 'rhs_quantizer')

KINDS = ('weights', 'activations')


@dataclass
class LayerError:
    """A row of the ranking.

    Attributes:
        name: As in overrides, see :class:`psaq_mm.quantization.Override`.
        position: In the network, from 0.
        kind: Class of the layer, or ``'activation'``.
        bits: Of ``'weights'`` and ``'activations'``, as far as the layer has them.
        elements: How many numbers have those bits: in the weight, and in the activations of one sample.
        error: Of the outputs, with this layer alone quantized.
        parts: The same with its weights alone, and its activations alone, where a budget needs it.
        metrics: Of the test set, where they are measured.
    """

    name: str
    position: int
    kind: str
    bits: Dict[str, int]
    elements: Dict[str, int]
    error: float
    parts: Dict[str, float]
    metrics: Dict[str, Optional[float]]


@dataclass(frozen=True)
class Choice:
    """Layers that get more bits.

    Attributes:
        overrides: To be added to a spec's.
        average: Average bits before and after, of weights and activations.
    """

    overrides: Tuple[Override, ...]
    average: Dict[str, Tuple[float, float]]


def layer_quantizers(model: nn.Module) -> Dict[str, Dict[str, List[Quantizer]]]:
    """Quantizers by layer and by what they quantize, in the order of the network.

    Returns:
        By name of a layer, product or edge, as in overrides: its ``'weights'`` and ``'activations'``.
    """
    part = quantized_part(model)
    modules, layers = dict(part.named_modules()), {}
    for name, quantizer in quantizers(part):
        owner, _, attribute = name.rpartition('.')
        edge = attribute not in _OF_A_LAYER and not isinstance(modules[owner], QuantMatMul)
        row = f'{owner}.{attribute[: -len("_quantizer")]}'.lstrip('.') if edge else owner
        kinds = layers.setdefault(row, dict(weights=[], activations=[]))
        kinds['weights' if attribute == 'weight_quantizer' else 'activations'].append(quantizer)
    return layers


@contextlib.contextmanager
def only_quantized(model: nn.Module, chosen: Sequence[Quantizer]) -> Iterator[None]:
    """Inside the block the ``chosen`` quantizers are on and all others off; then all are as they were."""
    with in_mode([quantizer for _, quantizer in quantizers(model)], 'off'), in_mode(chosen, 'on'):
        yield


def outputs_to_compare(model: nn.Module, batches: Sequence[Tensor]) -> Callable[[], List[List[Tensor]]]:
    """A function that runs the model on all samples and returns the outputs to compare, one list for each batch.

    They are those that a student learns by default, and with ``scope='full'`` those of all heads. RoI heads get the
    RoIs that the model proposes when this function is called, decoders the queries that it chooses then.

    Args:
        model: Calibrated; its quantizers should be off while this is called.
        batches: Normalized samples, (B, C, H, W) each.
    """
    task, part = TaskModel(model), quantized_part(model)
    rois: List[Optional[List[Tensor]]] = [None] * len(batches)
    queries: List[Any] = [None] * len(batches)
    if part is model and part.quant_spec.scope == 'full':
        task = TaskModel(model, (*task.parts, 'head'))
        rois = [task.proposals(batch) for batch in batches]
        if task.task.chooses_queries(model):
            with torch.no_grad():
                queries = [task.run(batch).chosen for batch in batches]

    @torch.no_grad()
    def run() -> List[List[Tensor]]:
        return [
            task.outputs(batch, chosen) + ([] if boxes is None else task.roi_outputs(batch, boxes))
            for batch, boxes, chosen in zip(batches, rois, queries)
        ]

    return run


def mean_error(outputs: List[List[Tensor]], reference: List[List[Tensor]]) -> float:
    """:func:`~psaq_mm.calibration.discrepancy.normalized_l1` averaged over batches."""
    return sum(float(normalized_l1(batch, expected)) for batch, expected in zip(outputs, reference)) / len(reference)


def _count_activations(model: nn.Module, run: Callable[[], List], samples: int) -> Dict[int, int]:
    """How many elements of one sample each quantizer reads, by its id."""
    counts: Dict[int, int] = {}

    def count(module, inputs) -> None:
        counts[id(module)] = counts.get(id(module), 0) + inputs[0].numel()

    with hooked(
        (quantizer for _, quantizer in quantizers(model)), lambda quantizer: quantizer.register_forward_pre_hook(count)
    ):
        run()
    return {key: value // samples for key, value in counts.items()}


def measure_layers(
    model: nn.Module,
    batches: Sequence[Tensor],
    kinds: Sequence[str] = (),
    progress: Optional[Callable[[int, int, LayerError], None]] = None,
) -> Tuple[List[LayerError], float]:
    """Quantize each layer alone, and measure the error of the outputs.

    Args:
        model: Quantized and calibrated, in eval mode.
        batches: Normalized samples, (B, C, H, W) each.
        kinds: Of :data:`KINDS`: each is also measured alone.
        progress: Called with number, count and row after each layer.

    Returns:
        Rows, the most sensitive first; and the error with every layer quantized.
    """
    grouped = layer_quantizers(model)
    with only_quantized(model, ()):
        run = outputs_to_compare(model, batches)
        reference = run()
        counts = _count_activations(model, run, sum(len(batch) for batch in batches))
    modules = dict(quantized_part(model).named_modules())
    rows: List[LayerError] = []
    for name, groups in grouped.items():
        owner, errors = modules.get(name), {}
        layer = groups['weights'] + groups['activations']
        for kind in ('both', *kinds):
            chosen = layer if kind == 'both' else groups[kind]
            if chosen and kind != 'both' and len(chosen) == len(layer):  # it has no other kind
                errors[kind] = errors['both']
            elif chosen:
                with only_quantized(model, chosen):
                    errors[kind] = mean_error(run(), reference)
        bits = {kind: min(q.bits for q in group) for kind, group in groups.items() if group}
        elements = {}
        if groups['activations']:
            elements['activations'] = sum(counts.get(id(q), 0) for q in groups['activations'])
        if groups['weights']:
            elements['weights'] = owner.weight.numel()
        kind = 'activation' if owner is None else type(owner).__name__
        rows.append(LayerError(name, len(rows), kind, bits, elements, errors.pop('both'), errors, {}))
        if progress:
            progress(len(rows), len(grouped), rows[-1])
    with only_quantized(model, [q for groups in grouped.values() for group in groups.values() for q in group]):
        error_of_all = mean_error(run(), reference)
    return sorted(rows, key=lambda row: -row.error), error_of_all


def _average(rows: Sequence[LayerError], kind: str, raised: Dict[str, int]) -> float:
    counted = [(raised.get(row.name, row.bits[kind]), row.elements[kind]) for row in rows if kind in row.bits]
    return sum(bits * count for bits, count in counted) / max(1, sum(count for _, count in counted))


def choose_bits(rows: Sequence[LayerError], budgets: Dict[str, float], high: int = 8) -> Choice:
    """Which layers to raise to ``high`` bits so that the average bits stay within a budget.

    Greedy: layers are sorted by error per added bit, and each one that still fits the budget is raised.

    Args:
        rows: From :func:`measure_layers`, measured for the kinds of ``budgets``.
        budgets: Average bits of ``'weights'`` (over the weights of all quantized layers) and of ``'activations'`` (over
            all quantized activations of one sample). A kind that is not in it stays as it is.
        high: Bits of a raised layer.

    Raises:
        ConfigError: A budget is below what the config has already, or above ``high``.
    """
    raised: Dict[str, Dict[str, int]] = {kind: {} for kind in budgets}
    average: Dict[str, Tuple[float, float]] = {}
    for kind, budget in budgets.items():
        option = '--budget' if kind == 'weights' else '--activation-budget'
        before = _average(rows, kind, {})
        if not before <= budget <= high:
            raise ConfigError(
                f'{option} {budget:g} is outside of what can be had: {kind} have {before:.2f} bits on average now and '
                f'at most {high}'
            )
        candidates = [row for row in rows if row.bits.get(kind, high) < high and row.elements[kind]]
        total = sum(row.elements[kind] for row in rows if kind in row.bits)
        room = (budget - before) * total + 1e-6 * total
        for row in sorted(candidates, key=lambda r: -r.parts[kind] / (r.elements[kind] * (high - r.bits[kind]))):
            cost = row.elements[kind] * (high - row.bits[kind])
            if cost <= room and row.parts[kind] > 0:
                room -= cost
                raised[kind][row.name] = high
        average[kind] = (before, _average(rows, kind, raised[kind]))
    names = [row.name for row in rows if any(row.name in chosen for chosen in raised.values())]
    overrides = tuple(
        Override(_literal(name), raised.get('weights', {}).get(name), raised.get('activations', {}).get(name))
        for name in names
    )
    return Choice(overrides, average)


def _literal(name: str) -> str:
    """A pattern that matches ``name`` alone."""
    return ''.join(f'[{c}]' if c in '*?[' else c for c in name)


def with_overrides(spec: QuantSpec, choice: Choice) -> Dict:
    """Settings of ``spec`` that differ from the defaults, with the choice's overrides added, for a config."""
    plain, settings = QuantSpec().to_dict(), spec.to_dict()
    kept = {key: value for key, value in settings.items() if key in ('w_bits', 'a_bits') or value != plain[key]}
    kept['overrides'] = settings['overrides'] + [override.to_dict() for override in choice.overrides]
    return kept
