# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What calibration, training and synthesis ask of a network."""

from typing import Any, List, Optional, Protocol, Tuple

from torch import Tensor, nn

from psaq_mm.errors import ConfigError
from psaq_mm.pictures import ImageSpec

__all__ = ['Network', 'check_size']


class Network(Protocol):
    """A teacher or a student. :class:`psaq_mm.models.TaskModel` is one."""

    model: nn.Module

    @property
    def image_spec(self) -> ImageSpec:
        """Normalization, channels and value range of the input."""

    @property
    def min_size(self) -> int:
        """Least height and width of an image, in pixels."""

    @property
    def fixed_size(self) -> Optional[Tuple[int, int]]:
        """The only (height, width) that the network takes; None where it takes others too."""

    @property
    def prefix_tokens(self) -> int:
        """Tokens before those of the patches, such as a class token."""

    @property
    def num_classes(self) -> Optional[int]:
        """Classes of a classifier, else None."""

    def outputs(self, images: Tensor) -> List[Tensor]:
        """Feature maps to distil, for normalized ``images`` (B, C, H, W)."""

    def run(self, images: Tensor, with_logits: bool = False) -> Any:
        """One forward pass: ``parts`` (as :meth:`outputs`) and ``logits`` (B, classes) or None.

        A network that chooses what it decodes returns ``chosen`` as well, and takes another network's as an argument of
        that name.
        """

    def calibration_forward(self, images: Tensor, scope: str = 'backbone') -> None:
        """Run every layer that ``scope`` quantizes."""


def check_size(network: Network, size: Tuple[int, int]) -> None:
    """Check that a network takes pictures of ``size`` (height, width).

    Raises:
        ConfigError: They are smaller than one attention window, or the position embedding has another size.
    """
    if min(size) < network.min_size:
        raise ConfigError(
            f'size={tuple(size)} is smaller than one attention window of {network.min_size} pixels: give a larger size'
        )
    if network.fixed_size is not None and tuple(size) != tuple(network.fixed_size):
        raise ConfigError(
            f'size={tuple(size)} does not fit the position embedding of the model: set size={tuple(network.fixed_size)}'
        )
