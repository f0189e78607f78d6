# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""PyTorch's exporter, for one module: its graph with the symbols of ``symbols.py``."""

import inspect
import io
import warnings
from typing import Any, Dict, Mapping, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from psaq_mm.deploy.parts import NotInGraph
from psaq_mm.deploy.symbols import DOMAIN

__all__ = ['state_shapes_', 'trace']


def trace(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: Sequence[str],
    opset: int,
    dynamic: Optional[Mapping[str, Mapping[int, str]]] = None,
    has_symbols: bool = True,
) -> Any:
    """Trace a module.

    Args:
        module: Its forward takes the tensors of ``inputs`` in their order, and gives a tensor or a tuple of them.
        inputs: By the name that the graph has for them.
        outputs: Names of its outputs.
        opset: Of ONNX.
        dynamic: By the name of an input or output, the names of its axes that have no fixed size.
        has_symbols: Whether the module has any of ``symbols.py``: PyTorch warns of a domain that is not used.

    Returns:
        ONNX model.

    Raises:
        NotInGraph: It has an operator that ONNX does not have.
    """
    import onnx

    file = io.BytesIO()
    settings: Dict[str, Any] = dict(
        input_names=list(inputs),
        output_names=list(outputs),
        opset_version=opset,
        custom_opsets={DOMAIN: 1} if has_symbols else {},
        do_constant_folding=True,
        dynamic_axes={name: dict(axes) for name, axes in (dynamic or {}).items()},
    )
    if 'dynamo' in inspect.signature(torch.onnx.export).parameters:
        settings['dynamo'] = False  # the default exporter of newer PyTorch does not know the symbols
    arguments: Tuple[Tensor, ...] = tuple(inputs.values())
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter('ignore')  # it warns that sizes become constants, as they should
        try:
            torch.onnx.export(module, arguments, file, **settings)
        except Exception as error:  # its own errors, and any other one that an unknown operator leads to
            raise NotInGraph(
                f'the exporter ends in "{(str(error).strip() or type(error).__name__).splitlines()[0]}"'
            ) from error
    model = onnx.load_model_from_string(file.getvalue())
    foreign = sorted(
        {f'{node.domain}::{node.op_type}' for node in model.graph.node if node.domain not in ('', 'ai.onnx', DOMAIN)}
    )
    if foreign:
        raise NotInGraph(f'it needs {" and ".join(foreign)}, which ONNX does not have')
    return model


def state_shapes_(
    model: Any, shapes: Mapping[str, Sequence[int]], dynamic: Optional[Mapping[str, Mapping[int, str]]] = None
) -> None:
    """Write the shapes of its outputs into a traced graph, in place. PyTorch's exporter does not know all of them, and
    names the sizes that it does not know after operations.

    Args:
        model: ONNX model.
        shapes: By the name of an output.
        dynamic: See :func:`trace`.
    """
    for output in model.graph.output:
        free = (dynamic or {}).get(output.name, {})
        dims = output.type.tensor_type.shape.dim
        del dims[:]
        for axis, size in enumerate(shapes[output.name]):
            dims.add(**(dict(dim_param=free[axis]) if axis in free else dict(dim_value=size)))
