# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Report of an exported graph: which tensors are integer, and why the others are float."""

import os
from collections import Counter
from pathlib import Path
from typing import Any, Dict, Iterable, List, Tuple, Union

from psaq_mm.deploy.exportable import ExportableModel
from psaq_mm.deploy.parts import rest_state
from psaq_mm.deploy.symbols import CAST_VALUE
from psaq_mm.errors import first_of
from psaq_mm.quantization import ConversionReport
from psaq_mm.runtime.kernels import EXPLAINED

__all__ = ['execution', 'sizes_of', 'summary', 'tensor_rows']

_PRODUCTS = ('MatMul', 'Gemm', 'Conv', 'ConvTranspose')

_FLOAT_OPERATIONS = {
    'LayerNormalization': 'normalization: mean and variance need more than 8 bits',
    'Softmax': 'its output is quantized where the spec says so',
    'Erf': 'GELU: its output is quantized where a layer reads it',
    'BatchNormalization': 'follows a convolution that it could not be folded into',
    'Resize': 'interpolation between levels',
}


def tensor_rows(graph, exportable: ExportableModel, report: ConversionReport) -> List[Dict[str, Any]]:
    """One row for each weight, each quantized activation, and each product that is not integer on both sides.

    Args:
        graph: A :class:`.lowering.LoweredGraph`.
        exportable: The model that it was traced from.
        report: Of the model's conversion; it has the reasons why layers stay float.

    Returns:
        Dicts with ``name``, ``kind``, ``type`` and, where it is float, ``reason``.
    """
    rows: List[Dict[str, Any]] = []
    # one part of each layer: all parts of a layer have the same type
    layers = {weight.layer: weight for weight in exportable.weights.values() if weight.layer is not None}
    for name, weight in layers.items():
        rows.append(
            dict(
                name=f'{name}.weight',
                kind='weight',
                type=str(weight.codes.dtype).replace('torch.', ''),
                bits=weight.bits,
            )
        )
    for name, codes in exportable.quantizers.items():
        if name not in graph.values:
            continue  # outside the graph (RoI heads)
        bits = (codes.high - codes.low + 1).bit_length() - 1
        if codes.log_base:
            reason = (
                f'{codes.log_base} codes have no integer product in the runtimes: ordinary operations give their values'
            )
            rows.append(dict(name=name, kind='activation', type='float32', bits=bits, reason=reason))
        else:
            signed = codes.low < 0 or codes.shift is not None
            rows.append(dict(name=name, kind='activation', type='int8' if signed else 'uint8', bits=bits))
    rows += [dict(name=row.name, kind=row.kind, type='float32', reason=row.reason) for row in report.floats]
    rows += [dict(name=name, kind='layer', type='float32', reason=note) for name, note in exportable.notes.items()]
    rows += _float_products(graph)
    counts = Counter(node.op_type for node in graph.model.graph.node)
    rows += [
        dict(name=kind, kind=f'{counts[kind]} operations', type='float32', reason=reason)
        for kind, reason in _FLOAT_OPERATIONS.items()
        if counts[kind]
    ]
    return rows


def _float_products(graph) -> Iterable[Dict[str, Any]]:
    producer = {output: node for node in graph.model.graph.node for output in node.output}
    for node in graph.model.graph.node:
        if node.op_type not in _PRODUCTS:
            continue
        sides = [_is_integer(name, producer) for name in node.input[:2]]
        if any(sides) and not all(sides):
            side = 'left' if sides[1] else 'right'
            yield dict(
                name=node.name,
                kind=node.op_type,
                type='float32',
                reason=f'its {side} operand is not quantized, so that the other one is widened for the product',
            )


def _is_integer(name: str, producer) -> bool:
    node = producer.get(name)
    while node is not None and node.op_type in (
        'Transpose',
        'Reshape',
        'Unsqueeze',
        'Squeeze',
        'Flatten',
        'Slice',
        'Concat',
        'Gather',
        'DepthToSpace',
    ):
        node = producer.get(node.input[0])
    return node is not None and (node.op_type == 'DequantizeLinear' or node.output[0].endswith(CAST_VALUE))


def summary(rows: List[Dict[str, Any]]) -> str:
    """A table for the console: counts of integer tensors, and every reason why something is float."""
    kinds = Counter((row['kind'], row['type'], row['bits']) for row in rows if 'reason' not in row)
    lines = [f'{count} {kind}s as {type_}, {bits} bits' for (kind, type_, bits), count in sorted(kinds.items())]
    reasons: Dict[str, List[Dict[str, Any]]] = {}
    for row in rows:
        if 'reason' in row:
            reasons.setdefault(row['reason'], []).append(row)
    for reason, found in reasons.items():
        names = first_of([row['name'] for row in found])
        lines.append(f'float: {names}: {reason}')
    return '\n'.join(lines)


def sizes_of(model, exported, directory: Union[str, os.PathLike, None] = None) -> Tuple[int, int]:
    """Bytes of an export, all files together, and of the same weights in float32.

    Args:
        model: That was exported.
        exported: The :class:`.export.ExportedModel`.
        directory: Where it is written in another format. Defaults to None, the directory of ``exported``.
    """
    on_disk = sum(path.stat().st_size for path in Path(directory or exported.directory).iterdir() if path.is_file())
    manifest = exported.manifest
    prefixes = tuple(f'{p}.' if p else '' for p in manifest['replaced'])
    outside = {} if manifest['complete'] else rest_state(model, manifest['replaced'])
    float32 = sum(4 * p.numel() for name, p in model.named_parameters() if name.startswith(prefixes) or name in outside)
    return on_disk, float32


def execution(deployed, size: Tuple[int, int]) -> str:
    """Text on how a runtime executes the products of its graphs: how many as integers, and which ones as floats.

    Args:
        deployed: A :class:`~psaq_mm.runtime.DeployedModel`.
        size: One of its sizes; box and mask heads have a graph each beside that one.
    """
    lines = _executed(f'{deployed.runtime}, {size[0]} x {size[1]}', deployed.session(size), deployed.graph(size))
    heads = deployed.manifest.get('heads') or {}
    for kind in ('box', 'mask'):
        for stage in range(len(heads.get(kind) or ())):
            label = f'{deployed.runtime}, {kind} head' + (f' {stage + 1}' if len(heads[kind]) > 1 else '')
            lines += _executed(label, deployed.head_session(kind, stage), deployed.head_graph(kind, stage))
    return '\n'.join(lines)


def _executed(label: str, session: Any, graph: bytes) -> List[str]:
    products = session.products(graph)
    counts = Counter(product.how for product in products)
    facts = [f'{counts["integer"]} of {len(products)} products are integer']
    facts += [f'{counts["fused"]} attentions are fused into one kernel, which does not tell'] if counts['fused'] else []
    facts += [EXPLAINED[session.kernels]] if session.kernels != 'integer' else []
    lines = [f'{label}: ' + ', '.join(facts)]
    by_reason: Dict[str, List[str]] = {}
    for product in products:
        if product.how == 'float':
            by_reason.setdefault(product.why, []).append(f'{product.name} ({product.kind})')
    for why, names in by_reason.items():
        if why:
            lines += [f'  float, {why}:', *(f'    {name}' for name in names)]
        else:
            lines += [f'  float: {name}' for name in names]
    return lines
