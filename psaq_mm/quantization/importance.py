"""Importance of each row of a layer's output for the outputs of the model.

Tokens differ: in the last block of a classifier only the class token is read, and background counts less than objects.
The squared gradient of a loss with respect to a row of a layer's output is the weight of that row: under these weights
the layer's squared error approximates the error of the model's outputs (a block of the Gauss-Newton matrix;
GuidedQuant, arXiv 2505.07004, section 3, with all channels of a layer in one group).
"""

from typing import Callable, Dict, List, Optional, Tuple

import torch
from torch import Tensor, nn

from psaq_mm.contexts import hooked
from psaq_mm.errors import DataError
from psaq_mm.quantization.layers import QuantConv2dMixin, QuantLinearMixin, full_precision_weights, is_quantized_layer
from psaq_mm.quantization.rows import row_mask_given, valid_rows_of
from psaq_mm.ranks import sum_

__all__ = ['RowImportance', 'row_importance']


class RowImportance(Dict[str, Tensor]):
    """Weights of the rows of each layer, (rows,), by name of the layer.

    Attributes:
        calls: Number of rows of each call, by name of the layers that were called several times between two backward
            passes, such as a head that is applied to all levels: batches of another size change the order of their
            rows.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Dict[str, Tuple[int, ...]] = {}


def row_importance(model: nn.Module, run: Callable[[], None]) -> RowImportance:
    """Squared gradient of each row (token, place of a convolution) of the output of every quantized layer.

    The weights are in full precision meanwhile, as in :func:`.round_weights_`.

    Args:
        model: Calibrated quantized model. Its parameters need no gradients, the input images do.
        run: Puts the samples through the model in forward and backward passes. Losses are sums over samples.

    Returns:
        By layer name, (rows,) in the order of the forward passes, without padding, with mean 1 over the rows of all
        ranks; 0 for the rows of a call that no gradient reached. Layers that no gradient reached are missing.

    Raises:
        DataError: Reentrant activation checkpointing runs a layer several times in a pass, and which gradient belongs
            to which call is unknown.
    """
    passes = _Passes()
    calls_of: Dict[nn.Module, _Calls] = {
        layer: _Calls(name, passes)
        for name, layer in model.named_modules()
        if is_quantized_layer(layer) and isinstance(layer, (QuantLinearMixin, QuantConv2dMixin))
    }
    with (
        full_precision_weights(model),
        hooked(calls_of, lambda layer: layer.register_forward_hook(calls_of[layer].hook)),
    ):
        run()
    importance = RowImportance()
    for calls in calls_of.values():
        rows = calls.rows()
        total, count = sum_(torch.tensor([float(rows.sum()), float(len(rows))], dtype=torch.float64)).tolist()
        if total > 0:
            importance[calls.name] = (rows * (count / total)).float()
            if len({call.number for call in calls.recorded}) < len(calls.recorded):
                importance.calls[calls.name] = tuple(call.count for call in calls.recorded)
    return importance


class _Passes:
    """Counts the passes of a run: a pass begins with the first call after a backward pass.

    Attributes:
        number: Of the current pass.
    """

    def __init__(self) -> None:
        self.number, self._went_back = 0, False

    def backward(self) -> None:
        """A backward pass is under way."""
        self._went_back = True

    def forward(self) -> int:
        """A layer is called outside of a backward pass; the number of its pass."""
        if self._went_back:
            self.number, self._went_back = self.number + 1, False
        return self.number


class _Call:
    """One call of a layer.

    Attributes:
        number: Of the pass.
        count: Rows that take part.
        open: Whether activation checkpointing may compute it again; its gradient comes then.
        energy: Squared gradient of each row, (count,), float64; None before a gradient came.
    """

    def __init__(self, number: int, count: int, open_: bool) -> None:
        self.number, self.count, self.open = number, count, open_
        self.energy: Optional[Tensor] = None


class _Calls:
    """The calls of a layer, and the gradients of their outputs."""

    def __init__(self, name: str, passes: _Passes) -> None:
        self.name, self.passes = name, passes
        self.recorded: List[_Call] = []

    def rows(self) -> Tensor:
        """Squared gradients of all rows, (rows,), float64, on the device of the gradients."""
        device = next((call.energy.device for call in self.recorded if call.energy is not None), None)
        parts = [
            torch.zeros(call.count, dtype=torch.float64, device=device) if call.energy is None else call.energy
            for call in self.recorded
        ]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)

    def hook(self, layer: nn.Module, args: Tuple, output: Tensor) -> None:
        """Forward hook of the layer."""
        valid, images = row_mask_given(args), isinstance(layer, QuantConv2dMixin)
        if torch._C._current_graph_task_id() == -1:
            rows = valid_rows_of((output[..., :1, :, :] if images else output[..., :1]).detach(), valid)
            self.recorded.append(_Call(self.passes.forward(), rows.numel(), not output.requires_grad))
            call: Optional[_Call] = self.recorded[-1]
        else:
            call = self._computed_again()
        if call is None or not output.requires_grad:
            return

        def keep(gradient: Tensor) -> None:
            self.passes.backward()
            # In float64: squares of small gradients are beyond float32.
            energy = gradient.double().pow(2).sum(-3 if images else -1)
            energy = valid_rows_of(energy[..., None], valid).reshape(-1)
            call.energy = energy if call.energy is None else call.energy + energy

        output.register_hook(keep)

    def _computed_again(self) -> Optional[_Call]:
        """The call that reentrant checkpointing computes again; None if not reentrant: the first call has gradients."""
        self.passes.backward()
        waiting = [call for call in self.recorded if call.open and call.number == self.passes.number]
        if len(waiting) > 1:
            raise DataError(
                f'Layer {self.name!r} is called {len(waiting)} times in a pass under reentrant activation '
                'checkpointing, which does not tell which call has which gradient: use torch.utils.checkpoint with '
                'use_reentrant=False, or with_cp=False'
            )
        for call in waiting:
            call.open = False
        return waiting[0] if waiting else None
