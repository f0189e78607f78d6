# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What several processes, the ranks, know together: sums and extremes over all of them, through ``torch.distributed``.

Without a process group, or with one rank, nothing is sent and every function gives back what it got. Every rank has to
call the same functions in the same order; all of them then hold the same bits.
"""

import contextlib
from typing import Iterable, Iterator, List, Sequence, Tuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from psaq_mm.errors import PsaqError

_BUCKET = 1 << 23
"""Gradients that are sent together, in elements: one message a parameter would take longer than what it carries."""

_OUT_OF_MEMORY = getattr(torch, 'OutOfMemoryError', None) or torch.cuda.OutOfMemoryError


class RankError(PsaqError, RuntimeError):
    """Another rank failed, or did not answer in time."""


def ranks() -> Tuple[int, int]:
    """This rank and how many there are: ``(0, 1)`` without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def own_part(count: int) -> slice:
    """The part of ``count`` things that is this rank's; the parts of all ranks, one after the other, are the whole."""
    rank, world = ranks()
    return slice(count * rank // world, count * (rank + 1) // world)


@contextlib.contextmanager
def _answered() -> Iterator[None]:
    try:
        yield
    except _OUT_OF_MEMORY:  # a RuntimeError too, of this rank's own device
        raise
    except RuntimeError as error:  # a closed connection, or the time limit of the process group
        first = (str(error).splitlines() or [''])[0]
        raise RankError(f'another rank failed or did not answer in time ({first}): its own message says why') from error


def _sent(tensor: Tensor) -> Tensor:
    """``tensor`` where the process group can send it from: NCCL knows no tensors of the CPU."""
    if tensor.device.type == 'cpu' and dist.get_backend() == 'nccl':
        return tensor.to('cuda')
    return tensor.contiguous()


def _reduce_(tensor: Tensor, operation: str) -> Tensor:
    if ranks()[1] > 1:
        sent = _sent(tensor)
        with _answered():
            dist.all_reduce(sent, getattr(dist.ReduceOp, operation))
        if sent is not tensor:
            tensor.copy_(sent)
    return tensor


def sum_(tensor: Tensor) -> Tensor:
    """Sum over the ranks, in place; without gradient."""
    return _reduce_(tensor, 'SUM')


def minimum_(tensor: Tensor) -> Tensor:
    """Minimum over the ranks, in place; without gradient."""
    return _reduce_(tensor, 'MIN')


def maximum_(tensor: Tensor) -> Tensor:
    """Maximum over the ranks, in place; without gradient."""
    return _reduce_(tensor, 'MAX')


def broadcast_(tensor: Tensor) -> Tensor:
    """What rank 0 has, in place."""
    if ranks()[1] > 1:
        sent = _sent(tensor)
        with _answered():
            dist.broadcast(sent, 0)
        if sent is not tensor:
            tensor.copy_(sent)
    return tensor


def barrier() -> None:
    """Wait until every rank is here, such as until rank 0 has written a file."""
    sum_(torch.zeros(1))


def leave() -> None:
    """End the group of ranks, once all of them are here. A process that ends while its group's threads still run is
    aborted now and then, and the launcher takes a run for failed whose files are all written.
    """
    if dist.is_available() and dist.is_initialized():
        barrier()
        dist.destroy_process_group()


def gathered(part: Tensor, count: int) -> Tensor:
    """The whole of what the ranks hold parts of.

    Args:
        part: ``(n, ...)``, what :func:`own_part` names of ``count``.
        count: Of all ranks together.

    Returns:
        ``(count, ...)`` on every rank.
    """
    if ranks()[1] == 1:
        return part
    # Each rank writes its own rows into zeros: x + 0 is x, and parts need not be of one size.
    full = part.new_zeros(count, *part.shape[1:])
    full[own_part(count)] = part
    return sum_(full)


def sum_gradients_(parameters: Iterable[nn.Parameter]) -> None:
    """Sum the gradients of ``parameters`` over the ranks, in place.

    A parameter that has a gradient on some ranks alone counts as 0 on the others.
    """
    if ranks()[1] == 1:
        return
    trained = [p for p in parameters if p.requires_grad]
    if not trained:
        return
    has = maximum_(torch.tensor([p.grad is not None for p in trained], dtype=torch.int32, device=trained[0].device))
    for parameter, anywhere in zip(trained, has.tolist()):
        if anywhere and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for bucket in _buckets([p.grad for p in trained if p.grad is not None]):
        flat = sum_(torch.cat([gradient.reshape(-1) for gradient in bucket]))
        for gradient, values in zip(bucket, flat.split([gradient.numel() for gradient in bucket])):
            gradient.copy_(values.view_as(gradient))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[List[Tensor]]:
    """Runs of tensors of one dtype, up to a bounded size."""
    bucket: List[Tensor] = []
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or sum(t.numel() for t in bucket) + tensor.numel() > _BUCKET):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


class _Sum(torch.autograd.Function):
    """Sum over the ranks whose gradient is that of the own summand."""

    @staticmethod
    def forward(ctx, value: Tensor) -> Tensor:
        return sum_(value.detach().clone())

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


class WholeBatch:
    """Statistics of a batch whose images lie on several ranks, from each rank's part.

    Their values are the same on every rank, and their gradient is what the whole statistic has for the images of this
    rank. So a loss made of them needs no reduction of its own.

    Args:
        images: How many are on this rank, 1 or more.

    Attributes:
        total: How many there are on all ranks.

    Example:
        >>> whole = WholeBatch(len(images))
        >>> loss = whole.mean(model(images).square().mean())
    """

    def __init__(self, images: int):
        self.images = images
        self.total = int(sum_(torch.tensor([images])))

    def sum(self, value: Tensor) -> Tensor:
        """Sum over the ranks of a value, any shape."""
        return _Sum.apply(value)

    def mean(self, value: Tensor) -> Tensor:
        """Mean over all images, from the mean over this rank's; any shape."""
        return _Sum.apply(value * (self.images / self.total))

    def range(self, low: Tensor, high: Tensor) -> Tuple[Tensor, Tensor]:
        """Least and greatest value of all ranks, each ``()``."""
        low, high = maximum_(torch.stack([-low, high]))
        return -low, high
