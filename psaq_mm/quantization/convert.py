"""Conversion of a model in place, and functions over all its quantizers: modes, calibration, state-dict keys."""

import re
from fnmatch import fnmatchcase
from typing import Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Tuple, Union

import torch
from torch import nn

from psaq_mm.errors import DataError, SpecError, first_of, similar
from psaq_mm.quantization.layers import QuantMatMul, adopt, is_quantized_layer, quant_class_of
from psaq_mm.quantization.observers import reduce_observers
from psaq_mm.quantization.precision import use_full_float32
from psaq_mm.quantization.quantizers import STATE_NAMES, Quantizer, Range, check_mode, in_mode, observing
from psaq_mm.quantization.spec import AdapterSpec, QuantSpec
from psaq_mm.tables import text_table

# Quantizers that have no row of their own in a report: the row of their layer or product covers them.
_LAYER_QUANTIZERS = ('input_quantizer', 'weight_quantizer', 'lhs_quantizer', 'rhs_quantizer')

_QUANTIZER_KEY = re.compile(r'(^|\.)\w+_quantizer\.(' + '|'.join(STATE_NAMES) + r')$')

FilterFn = Callable[[str, nn.Module], bool]
ConvertFn = Callable[[nn.Module, str, AdapterSpec], nn.Module]
"""Takes a module, its dotted name and the spec; returns the converted module."""


class Adapter(NamedTuple):
    """How one kind of composite module (attention) is converted."""

    matcher: Callable[[nn.Module], bool]
    convert: ConvertFn


ADAPTERS: List[Adapter] = []
"""All registered ones, in the order of registration; see :func:`register_adapter`."""


def register_adapter(matcher: Callable[[nn.Module], bool], convert: ConvertFn) -> None:
    """Teach :func:`quantize_` a composite module.

    Args:
        matcher: Whether a module is of the kind; must be False for a converted one.
        convert: Takes the module, its dotted name and the spec (:class:`.spec.AdapterSpec`), returns the converted
            module. Linear and convolution layers inside are converted afterwards, as anywhere; products of activations
            are the adapter's (:class:`.layers.QuantMatMul`).
    """
    ADAPTERS.append(Adapter(matcher, convert))


class QuantizedLayer(NamedTuple):
    """Row of a report: a quantized layer."""

    name: str
    kind: str
    w_bits: Optional[int]
    a_bits: Optional[int]


class FloatLayer(NamedTuple):
    """Row of a report: a layer that could have been quantized and was not."""

    name: str
    kind: str
    reason: str


class ConversionReport:
    """What a conversion did.

    Attributes:
        layers: :class:`QuantizedLayer` rows; a product of activations has ``w_bits=None``.
        floats: :class:`FloatLayer` rows.
    """

    def __init__(self) -> None:
        self.layers: List[QuantizedLayer] = []
        self.floats: List[FloatLayer] = []

    def name_parts(self, reasons: Mapping[str, str]) -> None:
        """Put one row, with its reason, in place of the float layers of each of these parts, by their dotted names."""
        for name, reason in reasons.items():
            inside = [row for row in self.floats if f'{row.name}.'.startswith(f'{name}.')]
            if inside:
                place = self.floats.index(inside[0])
                self.floats = [row for row in self.floats if row not in inside]
                self.floats.insert(place, FloatLayer(name, f'{len(inside)} layer{"s" * (len(inside) > 1)}', reason))

    def to_table(self) -> str:
        """Text table of both lists."""
        rows = [
            (r.name, r.kind, *('-' if bits is None else str(bits) for bits in (r.w_bits, r.a_bits)), '')
            for r in self.layers
        ]
        rows += [(r.name, r.kind, 'float', 'float', r.reason) for r in self.floats]
        return text_table(('layer', 'kind', 'weight bits', 'activation bits', 'note'), rows, 'lllll', rule=False)

    def __repr__(self) -> str:
        return f'ConversionReport({len(self.layers)} layers quantized, {len(self.floats)} left in float)'


class _Conversion:
    """State of one :func:`quantize_` call."""

    def __init__(self, model: nn.Module, spec: QuantSpec, filter_fn: Optional[FilterFn], first_layer: Optional[str]):
        self.model = model
        self.spec = AdapterSpec(spec)
        self.accept = filter_fn or (lambda name, module: True)
        self.first_layer = first_layer
        self.report = ConversionReport()

    def run(self) -> ConversionReport:
        """Convert composite modules first, then the layers, then check that every override matched something."""
        composites = self._find_composites()
        self._check_names(composites)
        self._convert_composites(composites)
        self._convert_layers()
        self._report_edges()
        floats = (row.name for row in self.report.floats)
        self._check_overrides([*self.spec.asked, *floats, *(name for name, _, _ in composites.values())])
        for name, quantizer in quantizers(self.model):
            quantizer.name = name
        return self.report

    def _find_composites(self) -> Dict[int, Tuple[str, nn.Module, Adapter]]:
        composites = {}
        for name, module in self.model.named_modules():
            if self.accept(name, module):
                adapter = next((a for a in ADAPTERS if a.matcher(module)), None)
                if adapter is not None:
                    composites[id(module)] = name, module, adapter
        return composites

    def _check_names(self, composites: Dict) -> None:
        """Refuse wrong names before anything is changed, as far as names are known then."""
        layers = [n for n, m in self.model.named_modules() if quant_class_of(m)[0] and self.accept(n, m)]
        if self.first_layer is not None and self.first_layer not in layers:
            raise SpecError(
                f'first_layer={self.first_layer!r} is no layer that gets quantized' + _hint(self.first_layer, layers)
            )
        if not composites:  # a composite's products of activations have no names yet
            self._check_overrides(layers)

    def _check_overrides(self, names: List[str]) -> None:
        for override in self.spec.overrides:
            if not any(fnmatchcase(name, override.pattern) for name in names):
                raise SpecError(
                    f'The override pattern {override.pattern!r} matches no layer' + _hint(override.pattern, names)
                )

    def _convert_composites(self, composites: Dict) -> None:
        new: Dict[int, nn.Module] = {}
        # Inner ones first: what contains them reads the parts that they tell.
        for key, (name, module, adapter) in reversed(list(composites.items())):
            # An excluded module is adapted too: adapters also do what is not quantization, such as masks of padding.
            excluded = self.spec.points == 'linear' or self.spec.resolve(name) is None
            new[key] = adapter.convert(module, name, self.spec.excluded() if excluded else self.spec)
        if id(self.model) in new and new[id(self.model)] is not self.model:
            raise SpecError(
                f'{type(self.model).__name__} is converted as a whole and cannot be exchanged in place: '
                'call quantize_ on a module that contains it.'
            )
        # modules() comes to the children of a module after it: also to those that are put in here.
        for parent in self.model.modules():
            # Not named_children: it leaves out the second name of a module that a parent holds twice.
            for child_name, child in list(parent._modules.items()):
                if id(child) in new and new[id(child)] is not child:
                    parent._modules[child_name] = new[id(child)]

    def _convert_layers(self) -> None:
        for name, module in list(self.model.named_modules()):
            if isinstance(module, QuantMatMul):
                self._report_matmul(name, module)
                continue
            quant_class, reason = quant_class_of(module)
            if quant_class is None and not reason:
                continue
            kind, layer_spec = type(module).__name__, None
            if not self.accept(name, module):
                reason = 'outside the scope'
            else:
                layer_spec = self.spec.resolve(name, is_input=name == self.first_layer)
                reason = 'override' if layer_spec is None else reason
            if quant_class is None or layer_spec is None or reason:
                self.report.floats.append(FloatLayer(name, kind, reason))
                continue
            output = self.spec.resolve(f'{name}.output') if self.spec.points == 'all' else None
            adopt(module, quant_class).add_quantizers(layer_spec, output)
            self.report.layers.append(QuantizedLayer(name, kind, layer_spec.w_bits, layer_spec.a_bits))

    def _report_edges(self) -> None:
        for name, quantizer in quantizers(self.model):
            owner, _, attribute = name.rpartition('.')
            if attribute not in _LAYER_QUANTIZERS:
                edge = attribute[: -len('_quantizer')]
                self.report.layers.append(
                    QuantizedLayer(f'{owner}.{edge}' if owner else edge, 'activation', None, quantizer.bits)
                )

    def _report_matmul(self, name: str, module: QuantMatMul) -> None:
        bits = [q.bits for q in (module.lhs_quantizer, module.rhs_quantizer, module.output_quantizer) if q is not None]
        if bits:
            self.report.layers.append(QuantizedLayer(name, type(module).__name__, None, min(bits)))
            if module.lhs_quantizer is None and self.spec.points != 'all':
                self.report.floats.append(FloatLayer(name, type(module).__name__, 'left operand left in float'))
        else:
            reason = 'override' if self.spec.points == 'gemm' else f'points={self.spec.points!r}'
            if self.spec.points == 'all':
                reason += ', operands come quantized or stay float (softmax)'
            self.report.floats.append(FloatLayer(name, type(module).__name__, reason))


def _hint(name: str, known: List[str]) -> str:
    if not known:
        return ': no layer of the model can be quantized.'
    near = similar(name, known, count=3) or known[:3]
    return f': layers are called, for example, {", ".join(map(repr, near))}.'


def quantize_(
    model: nn.Module,
    spec: Union[QuantSpec, Mapping, str],
    filter_fn: Optional[FilterFn] = None,
    first_layer: Optional[str] = None,
) -> ConversionReport:
    """Quantize a model in place; the quantizers still need a calibration or a checkpoint.

    Linear layers, convolutions and transposed convolutions become quantized ones, and composite modules that an adapter
    knows (:func:`register_adapter`) get quantized products. With ``spec.points='linear'`` the products stay in floating
    point. Parameter names stay. A module that several parents share is converted once.

    TF32 is switched off for the whole process, see :mod:`.precision`.

    Args:
        model: Float model.
        spec: :class:`.spec.QuantSpec` or what its ``parse`` reads.
        filter_fn: Which modules may be converted, by name and module; all if None.
        first_layer: Name of the layer that reads the image, which gets ``spec.input_bits``.

    Returns:
        What was converted and what was left.

    Raises:
        SpecError: The model is quantized already, or ``first_layer`` or an override's pattern matches nothing. In the
            last case, where the model has composite modules, it is already changed and must be built anew.

    Example:
        >>> report = quantize_(model, 'w4a8', first_layer='patch_embed.projection')
        >>> print(report.to_table())
    """
    spec = QuantSpec.parse(spec)
    name = next((n for n, _ in quantizers(model)), None)
    if name is not None:
        raise SpecError(f'The model is quantized already ({name!r}): build a float model and quantize that once.')
    report = _Conversion(model, spec, filter_fn, first_layer).run()
    use_full_float32()
    return report


def quantizers(model: nn.Module) -> Iterator[Tuple[str, Quantizer]]:
    """Every quantizer of a model once, with its dotted name."""
    for name, module in model.named_modules():
        if isinstance(module, Quantizer):
            yield name, module


def set_mode(model: nn.Module, mode: str, pattern: str = '*') -> List[str]:
    """Switch quantizers on or off.

    Args:
        model: Quantized model.
        mode: ``'on'`` or ``'off'``.
        pattern: Shell-style pattern over the names of quantizers or of the layers they belong to.

    Returns:
        Names of the quantizers that matched.

    Raises:
        SpecError: The mode is not known, or the pattern matches nothing.
    """
    check_mode(mode)
    by_name = dict(quantizers(model))
    matched = [n for n in by_name if fnmatchcase(n, pattern) or fnmatchcase(n.rpartition('.')[0], pattern)]
    if not matched:
        owners = list(dict.fromkeys(n.rpartition('.')[0] for n in by_name))
        raise SpecError(f'The pattern {pattern!r} matches no quantizer' + _hint(pattern, owners))
    for name in matched:
        by_name[name].mode = mode
    return matched


def calibrate(model: nn.Module, run: Callable[[], None], allow_unseen: bool = False) -> None:
    """Set all ranges: weights from the tensors, activations from one full-precision run.

    Where a layer's input is reparameterized (:attr:`.QuantSpec.reparameterize`), its LayerNorm and weight change as
    :class:`.reparam.Folding` says. Nothing is quantized during ``run``, so the ranges do not depend on the order of the
    layers. In a distributed run each rank passes its own samples, and all ranks get the ranges of all samples.
    Quantizers that are switched off stay so. All ranges are known before the first is set: after an error the model is
    as before.

    Args:
        model: Quantized model.
        run: Passes the calibration samples through the model; called once, without gradients.
        allow_unseen: Accept quantizers that saw no data. They keep their range of an earlier calibration, or raise
            NotCalibratedError when used.

    Raises:
        DataError: A weight or an activation holds NaN or infinity (names the layer), or a quantizer saw no data.
    """
    active = [(name, quantizer) for name, quantizer in quantizers(model) if quantizer.mode != 'off']
    owner_of = {model: model, **{child: parent for parent in model.modules() for child in parent.children()}}
    layers = {module.weight_quantizer: module for module in model.modules() if is_quantized_layer(module)}
    weights = [quantizer for _, quantizer in active if quantizer in layers]
    activations = {name: quantizer for name, quantizer in active if quantizer not in layers}
    with torch.no_grad(), observing(activations.values()):
        ranges: Dict[Quantizer, Range] = {
            quantizer: quantizer.range_of(layers[quantizer].weight) for quantizer in weights
        }
        with in_mode(weights, 'off'):
            run()
        reduce_observers([q.observer for q in activations.values() if q.observer is not None])
        _check_seen([name for name, quantizer in activations.items() if not quantizer.saw_data], allow_unseen)
        for quantizer in activations.values():
            if quantizer.saw_data:
                ranges.update((result.quantizer, result) for result in quantizer.finish(owner_of[quantizer]))
        for result in ranges.values():
            result.set()


def _check_seen(unseen: List[str], allow_unseen: bool) -> None:
    if unseen and not allow_unseen:
        names = first_of(unseen, 5)
        raise DataError(
            f'{len(unseen)} quantizers saw no data in calibration ({names}): put samples through these '
            'layers, switch them off, or pass allow_unseen=True.'
        )


def is_quantizer_key(key: str) -> bool:
    """Whether a state-dict key belongs to a quantizer; quantizers are attributes called ``..._quantizer``.

    Example:
        >>> is_quantizer_key('head.fc.input_quantizer.scale'), is_quantizer_key('head.fc.weight')
        (True, False)
    """
    return _QUANTIZER_KEY.search(key) is not None
