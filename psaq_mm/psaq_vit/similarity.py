# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Patch similarity entropy: how diverse the patches of an image are in the features of one attention block.

PSAQ-ViT (arXiv 2203.02250), Sec. 3.2: the all-pairs cosine similarity of the patches is treated as samples of a random
variable, its density is estimated with a Gaussian kernel, and the differential entropy of that density is maximized.
The density is evaluated on ``points`` positions between the least and the greatest similarity of the batch, which
are constants of the step: no gradient flows through them, as in the released code.
"""

import math
from typing import Any, Callable, Iterator, List, NamedTuple, Optional, Tuple, Union

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from psaq_mm.errors import DataError
from psaq_mm.quantization import RowMask

__all__ = ['patch_similarity_entropy']

RangeReducer = Callable[[Tensor, Tensor], Tuple[Tensor, Tensor]]

# A token shorter than this has no direction: its similarity to everything, and its gradient, are zero.
_NORM_FLOOR = 1e-8
# Similarity given to pairs that take no part: the kernel there is negligible beside any eps.
_NOWHERE = 1e3
# Similarities (not the kernel) are kept for the backward pass up to this many bytes, and computed again otherwise.
_KEEP_BYTES = 16 << 20
# Kernels are cut off at 2^-126, the least normal float32: smaller ones cost several times more and change nothing.
_LEAST_EXPONENT = -126.0
# Strips of rows that similarities fall into at most, and the least height of one: narrower ones compute fewer pairs
# twice and run slower. Nothing else counts: a group's similarities are summed alike whatever else is in the batch, so
# that ranks agree.
_STRIPS, _ROWS = 5, 16


def patch_similarity_entropy(
    tokens: Tensor,
    valid: Optional[Tensor] = None,
    points: int = 10,
    bandwidth: float = 0.01,
    eps: float = 1e-4,
    value_range: Optional[Tuple[float, float]] = None,
    groups_per_image: int = 1,
    reduce_range: Optional[RangeReducer] = None,
) -> Tensor:
    """Mean over the images of the differential entropy of their patch similarities.

    With s running over all ordered pairs of tokens of the groups of an image (a token with itself included, as in the
    released code of PSAQ-ViT) and x_k over the grid::

        p(x_k) = mean_s exp(-(s - x_k)^2 / (2 bandwidth^2)) / (bandwidth sqrt(2 pi))
        entropy = -trapezoid((p + eps) log(p + eps), x)

    Windows of one image share one density: similarities are taken inside each window and averaged over the image.
    Similarities are computed in float32 (float64 for float64 tokens), also under autocast. The backward pass
    recomputes the kernel by chunks, so nothing of size points x similarities is ever held.

    Source: arXiv 2203.02250, Sec. 3.2 (cosine similarity, kernel density and differential entropy); 10 points, the
    floor, and the grid without gradient are those of the released code.

    Args:
        tokens: Features, shape (B, N, D): one row of B per group (an image, or a window). Groups of one image are
            consecutive.
        valid: Boolean, shape (B, N), or (W, N) with W dividing B for a pattern that repeats every W groups. Tokens
            that are not valid take no part. Defaults to None, all take part.
        points: Number of grid points, at least 2.
        bandwidth: Standard deviation of the kernel, in units of similarity.
        eps: Added to the density before the logarithm.
        value_range: (least, greatest) similarity that bound the grid. Defaults to None, those of the batch.
        groups_per_image: Number of consecutive groups that belong to one image.
        reduce_range: Called with the batch's least and greatest similarity (0-dim tensors), returns those to use.
            Ranks of a distributed run pass a minimum and a maximum over the ranks, so that all share one grid.

    Returns:
        Entropy, shape (), in nats; differentiable with respect to ``tokens``.

    Raises:
        DataError: On shapes that do not fit, or an image without any valid token.

    Example:
        >>> tokens = torch.randn(2, 196, 64, requires_grad=True)
        >>> patch_similarity_entropy(tokens).backward()
    """
    plan = _Plan.build(tokens, valid, groups_per_image, points, bandwidth)
    itemsize = 8 if tokens.dtype == torch.float64 else 4
    keep = sum(block.pairs for block in plan.blocks()) * itemsize <= _KEEP_BYTES
    return _Entropy.apply(tokens, plan, eps, value_range, reduce_range, keep)


def _chunk_on(device: torch.device) -> int:
    """Similarities processed at a time: a few buffers of them stay in the cache of the cores that share the work."""
    return (1 << 16) * max(2, torch.get_num_threads()) if device.type == 'cpu' else 1 << 23


class _Block(NamedTuple):
    """A range of rows of the similarity matrices of a range of groups, from the diagonal on.

    Shape: (groups, rows, length - rows.start).
    """

    groups: slice
    rows: slice
    length: int

    @property
    def columns(self) -> slice:
        return slice(self.rows.start, self.length)

    @property
    def pairs(self) -> int:
        return math.prod(part.stop - part.start for part in (self.groups, self.rows, self.columns))


class _Plan:
    """Shapes, settings and blocks of one call."""

    def __init__(
        self,
        groups: int,
        length: int,
        valid: Optional[Tensor],
        per_image: int,
        points: int,
        bandwidth: float,
        chunk: int,
    ) -> None:
        self.groups, self.length, self.valid, self.per_image = groups, length, valid, per_image
        self.points, self.bandwidth, self.chunk = points, bandwidth, chunk

    @classmethod
    def build(
        cls,
        tokens: Tensor,
        valid: Optional[Tensor],
        per_image: int,
        points: int,
        bandwidth: float,
    ) -> '_Plan':
        if tokens.dim() != 3 or 0 in tokens.shape:
            raise DataError(f'tokens must be a non-empty (groups, tokens, channels) tensor, not {tuple(tokens.shape)}')
        if not tokens.is_floating_point():
            raise DataError(f'tokens must be floating point, not {tokens.dtype}; pass the attention output itself')
        groups, length, _ = tokens.shape
        if per_image < 1 or groups % per_image:
            raise DataError(f'groups_per_image={per_image} must divide the {groups} groups of tokens')
        if points < 2 or not bandwidth > 0:
            raise DataError(f'points={points} must be at least 2 and bandwidth={bandwidth} positive')
        if valid is not None:
            if valid.dim() != 2 or valid.dtype != torch.bool or valid.shape[1] != length or groups % len(valid):
                raise DataError(
                    f'valid of shape {tuple(valid.shape)} and type {valid.dtype} must be boolean, '
                    f'({groups}, {length}) or with fewer rows that divide {groups}'
                )
            valid = None if bool(valid.all()) else RowMask(valid).rows(tokens)
        return cls(groups, length, valid, per_image, points, bandwidth, _chunk_on(tokens.device))

    @property
    def images(self) -> int:
        return self.groups // self.per_image

    def blocks(self) -> Iterator[_Block]:
        """Blocks of about one chunk each. Together they hold every unordered pair of tokens of a group; pairs inside a
        strip of rows are there in both orders.
        """
        strips = max(min(_STRIPS, self.length // _ROWS), -(-(self.length**2) // self.chunk), 1)
        rows = -(-self.length // min(strips, self.length))
        for row in range(0, self.length, rows):
            strip = slice(row, min(row + rows, self.length))
            step = max(1, self.chunk // ((strip.stop - row) * (self.length - row)))
            for first in range(0, self.groups, step):
                yield _Block(slice(first, min(first + step, self.groups)), strip, self.length)

    def pairs_per_image(self) -> Union[Tensor, int]:
        """Ordered pairs of valid tokens in each image."""
        if self.valid is None:
            return self.per_image * self.length**2
        pairs = self.valid.sum(1).square().view(self.images, self.per_image).sum(1)
        if bool((pairs == 0).any()):
            raise DataError(
                f'image {int((pairs == 0).nonzero()[0])} has no valid token; leave it out or correct the valid mask'
            )
        return pairs


def _full_precision(tensor: Tensor) -> torch.autocast:
    """Context without autocast, which would run the matrix products in half precision."""
    return torch.autocast(tensor.device.type, enabled=False)


def _normalize(tokens: Tensor, valid: Optional[Tensor]) -> Tuple[Tensor, Tensor]:
    """Unit tokens and the reciprocals (B, N, 1) of their norms; zero for tokens without direction or not valid."""
    tokens = tokens if tokens.dtype == torch.float64 else tokens.float()
    norm = tokens.norm(dim=-1, keepdim=True)
    inverse = torch.where(norm > _NORM_FLOOR, norm.reciprocal(), torch.zeros_like(norm))
    unit = tokens * inverse
    if valid is not None:
        absent = ~valid.unsqueeze(2)
        unit, inverse = unit.masked_fill_(absent, 0), inverse.masked_fill_(absent, 0)
    return unit, inverse


def _denormalize(grad: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    """Gradient of the tokens from that of the unit tokens."""
    along = (unit * grad).sum(-1, keepdim=True)
    return grad.addcmul_(unit, along, value=-1).mul_(inverse)


class _Similarities:
    """Cosine similarities of unit tokens, block by block."""

    def __init__(self, unit: Tensor, plan: _Plan) -> None:
        self._left = self._right = unit
        if plan.valid is not None:
            # Two more channels put the pairs with an absent token far away, in the matrix product itself.
            away = torch.zeros_like(unit[..., :1]).masked_fill_(~plan.valid.unsqueeze(2), _NOWHERE)
            one = torch.ones_like(away)
            self._left, self._right = torch.cat([unit, away, one], 2), torch.cat([unit, one, away], 2)

    def __call__(self, block: _Block) -> Tensor:
        """Shape (groups, rows, columns); at least ``_NOWHERE`` less 1 for absent pairs."""
        return self._left[block.groups, block.rows] @ self._right[block.groups, block.columns].transpose(1, 2)


def _range(
    unit: Tensor, plan: _Plan, similarities: _Similarities, kept: Optional[List[Tensor]]
) -> Tuple[Tensor, Tensor]:
    """Least and greatest similarity of the batch; appends the blocks of similarities to ``kept``."""
    # No similarity exceeds the greatest squared norm of a token that takes part, which is its similarity to itself.
    squared = unit.square().sum(-1)
    greatest = (squared if plan.valid is None else squared.masked_fill(~plan.valid, -_NOWHERE)).amax()
    lows = []
    for block in plan.blocks():
        similarity = similarities(block)
        lows.append(similarity.amin())
        if kept is not None:
            kept.append(similarity)
    return torch.stack(lows).amin(), greatest


def _scale(bandwidth: float) -> float:
    """Factor c with exp(-s^2 / (2 bandwidth^2)) = 2^-(c s)^2."""
    return math.sqrt(0.5 / math.log(2)) / bandwidth


class _Kernel:
    """The kernel of one block at one grid point at a time, in buffers that stay in the cache.

    Pairs inside the block's strip of rows are there in both orders, all others in one: the kernel of the former is
    halved.
    """

    def __init__(self, plan: _Plan, grid: Tensor) -> None:
        self._buffers = grid.new_empty(3, max(block.pairs for block in plan.blocks()))
        self._scale = _scale(plan.bandwidth)
        self._grid = (grid * self._scale).unbind()

    def __call__(self, similarity: Tensor) -> Iterator[Tuple[Tensor, Tensor]]:
        """For each grid point the kernel of a block's similarities, without its constant factor, and their scaled
        distances to the point.

        Returns:
            Both of the shape of ``similarity``, to be used before the next ones are asked for.
        """
        scaled, distance, kernel = (buffer[: similarity.numel()].view(similarity.shape) for buffer in self._buffers)
        torch.mul(similarity, self._scale, out=scaled)
        halving = similarity.new_zeros(similarity.shape[1:])
        halving[:, : len(halving)] = -1  # of the exponent
        for point in self._grid:
            torch.sub(scaled, point, out=distance)
            # exp2 and not exp: exp goes through a vendor library that is several times slower on some processors.
            torch.addcmul(halving, distance, distance, value=-1, out=kernel).clamp_(min=_LEAST_EXPONENT).exp2_()
            yield kernel, distance


def _densities(
    unit: Tensor,
    plan: _Plan,
    value_range: Optional[Tuple[float, float]],
    reduce_range: Optional[RangeReducer],
    keep: bool,
) -> Tuple[Tensor, Tensor, Optional[List[Tensor]]]:
    """Grid (points,), densities (images, points), and the blocks of similarities if they are kept."""
    similarities = _Similarities(unit, plan)
    blocks: Optional[List[Tensor]] = [] if keep else None
    if value_range is None:
        low, high = _range(unit, plan, similarities, blocks)
    else:
        low, high = (torch.as_tensor(v, dtype=unit.dtype, device=unit.device) for v in value_range)
        if keep:
            blocks = [similarities(block) for block in plan.blocks()]
    if reduce_range is not None:
        low, high = reduce_range(low, high)
    steps = torch.arange(plan.points, dtype=unit.dtype, device=unit.device) / (plan.points - 1)
    grid = low + (high - low) * steps

    kernel_at = _Kernel(plan, grid)
    sums = unit.new_zeros(plan.points, plan.groups)
    for index, block in enumerate(plan.blocks()):
        similarity = similarities(block) if blocks is None else blocks[index]
        sums[:, block.groups] += torch.stack([kernel.sum((1, 2)) for kernel, _ in kernel_at(similarity)])
    sums = 2 * sums.view(plan.points, plan.images, plan.per_image).sum(2).t()
    return grid, (sums * _factor(plan)).to(sums.dtype), blocks


def _factor(plan: _Plan) -> Union[Tensor, float]:
    """Factor between the sum of the kernels over the pairs of an image and its density."""
    pairs = plan.pairs_per_image()
    constant = plan.bandwidth * math.sqrt(2 * math.pi)
    return 1 / (pairs.unsqueeze(1).double() * constant) if isinstance(pairs, Tensor) else 1 / (pairs * constant)


class _Entropy(torch.autograd.Function):
    """Entropy of the similarities of ``tokens``; the kernel is computed again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        plan: _Plan,
        eps: float,
        value_range: Optional[Tuple[float, float]],
        reduce_range: Optional[RangeReducer],
        keep: bool,
    ) -> Tensor:
        with _full_precision(tokens):
            unit, _ = _normalize(tokens, plan.valid)
            grid, density, blocks = _densities(unit, plan, value_range, reduce_range, keep)
            p = density + eps
            log_p = p.log()
            weights = (grid[1] - grid[0]).expand_as(grid).clone()
            weights[0] /= 2
            weights[-1] /= 2
            entropy = -(p * log_p * weights).sum(1).mean()
            # Of the entropy with respect to the sum of kernels of each image at each grid point.
            slope = (-(log_p + 1) * weights * (_factor(plan) / plan.images)).to(p.dtype)
        ctx.plan, ctx.blocks = plan, blocks
        ctx.save_for_backward(tokens, grid, slope)
        return entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Tuple[Optional[Tensor], ...]:
        tokens, grid, slope = ctx.saved_tensors
        plan: _Plan = ctx.plan
        with _full_precision(tokens):
            unit, inverse = _normalize(tokens, plan.valid)
            similarities = None if ctx.blocks is not None else _Similarities(unit, plan)
            # d kernel / d s = -2 log(2) scale distance kernel, and each pair counts in both of its orders.
            slope = slope * (grad_output * (-4 * math.log(2) * _scale(plan.bandwidth)))
            slopes = slope.repeat_interleave(plan.per_image, 0).t().contiguous()[..., None, None]
            kernel_at = _Kernel(plan, grid)
            grad = torch.zeros_like(unit)
            pairs_buffer = unit.new_empty(max(block.pairs for block in plan.blocks()))
            for index, block in enumerate(plan.blocks()):
                similarity = similarities(block) if similarities is not None else ctx.blocks[index]
                pairs = pairs_buffer[: block.pairs].view_as(similarity).zero_()
                for at_point, (kernel, distance) in zip(slopes[:, block.groups].unbind(), kernel_at(similarity)):
                    pairs.addcmul_(kernel.mul_(distance), at_point)
                _add_products_(grad, pairs, unit, block)
            grad = _denormalize(grad, unit, inverse)
        return (grad.to(tokens.dtype), None, None, None, None, None)


def _add_products_(grad: Tensor, pairs: Tensor, unit: Tensor, block: _Block) -> None:
    """Add the gradients of both tokens of each pair to ``grad``, from those of the pairs (groups, rows, columns)."""
    grad[block.groups, block.rows] += pairs @ unit[block.groups, block.columns]
    grad[block.groups, block.columns] += pairs.transpose(1, 2) @ unit[block.groups, block.rows]
