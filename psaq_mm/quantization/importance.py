"""How much each row of a layer's output matters to what a model finally says.

Tokens are not alike: in the last block of a classifier only the class token is read, and background says less than objects. The
squared gradient of a loss with respect to a layer's output, a row at a time, is the weight under which the layer's own squared
error approximates what the model's outputs make of it (a block of the Gauss-Newton matrix; GuidedQuant, arXiv 2505.07004, section 3,
with all channels of a layer in one group).
"""
import contextlib
from typing import Callable, Dict, List, Optional, Tuple

import torch
from torch import Tensor, nn

from .layers import QuantConv2dMixin, QuantLinearMixin, full_precision_weights, is_quantized_layer
from .observers import valid_rows_of
from .reduction import sum_

__all__ = ['row_importance']


def row_importance(model: nn.Module, run: Callable[[], None]) -> Dict[str, Tensor]:
    """Squared gradients at the outputs of every quantized Linear and convolution, a row (token, place of a convolution) at a time.

    Taken with the weights in full precision, as :func:`.round_weights_` takes the inputs.

    Args:
        model: Calibrated quantized model. Its parameters need no gradients, the images that go in do.
        run: Puts the samples through the model in forward and backward passes, the losses being sums over samples.

    Returns:
        By layer name, (rows,) in the order in which the rows went in, padding left out, with mean 1 over the rows of all ranks.
        Layers that no gradient reached are missing.
    """
    slots: Dict[str, List[List[Optional[Tensor]]]] = {}
    layers = [(n, m) for n, m in model.named_modules()
              if is_quantized_layer(m) and isinstance(m, (QuantLinearMixin, QuantConv2dMixin))]
    with contextlib.ExitStack() as hooks:
        hooks.enter_context(full_precision_weights(model))
        for name, layer in layers:
            hooks.callback(layer.register_forward_hook(_output_hook(slots.setdefault(name, []))).remove)
        run()
    found = {}
    for name, _ in layers:
        # What activation checkpointing computes again is seen twice, and has gradients once.
        reached = [rows for rows, in slots[name] if rows is not None]
        rows = torch.cat(reached) if reached else torch.zeros(0, dtype=torch.float64)
        total, count = sum_(torch.tensor([float(rows.sum()), float(len(rows))], dtype=torch.float64)).tolist()
        if total > 0:
            found[name] = (rows * (count / total)).float()
    return found


def _output_hook(slots: List[List[Optional[Tensor]]]) -> Callable:

    def hook(layer: nn.Module, args: Tuple, output: Tensor) -> None:
        if not output.requires_grad:
            return
        slot: List[Optional[Tensor]] = [None]
        slots.append(slot)
        valid, images = layer.valid_rows, isinstance(layer, QuantConv2dMixin)

        def keep(gradient: Tensor) -> None:
            # In float64: squares of small gradients are beyond float32.
            energy = gradient.double().pow(2).sum(-3 if images else -1)
            energy = valid_rows_of(energy[..., None], valid) if valid is not None and not images else energy
            energy = energy.reshape(-1)
            slot[0] = energy if slot[0] is None else slot[0] + energy

        output.register_hook(keep)

    return hook
