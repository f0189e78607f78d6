# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Real images as a control: only on request, and only from a config's own training set."""

from typing import Any, Dict, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psaq_mm.engine.data_overlap import check_no_overlap
from psaq_mm.errors import ConfigError, DataError

__all__ = ['TrainingImages', 'training_images']


class TrainingImages:
    """Images of a dataset in a random order, each call going on where the last one stopped; see
    :func:`training_images`.
    """

    def __init__(self, dataset, model: nn.Module, size: Tuple[int, int], seed: int) -> None:
        self.dataset, self.model, self.size, self.position = dataset, model, tuple(size), 0
        self.order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()

    def take(self, count: int, only: Optional[Sequence[int]] = None) -> Tensor:
        """The next ``count`` images, normalized, (count, C, height, width); past the last one, the first again.

        Args:
            count: How many.
            only: Which of them, from 0, instead of all; without any the tensor is empty.
        """
        images, (height, width) = [], self.size
        first, self.position = self.position, self.position + count
        for place in range(count) if only is None else only:
            item = self.dataset[self.order[(first + place) % len(self.order)]]
            batch = self.model.data_preprocessor(
                dict(inputs=[item['inputs']], data_samples=[item['data_samples']]), training=False
            )
            image = batch['inputs'][0].detach().cpu()[:, :height, :width]
            images.append(F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1])))
        return torch.stack(images) if images else torch.empty(0)

    __call__ = take

    def state_dict(self) -> Dict[str, Any]:
        """State, to be saved in a checkpoint."""
        return dict(position=self.position)

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave."""
        self.position = int(state['position'])


def training_images(config, model: nn.Module, size: Tuple[int, int], seed: int) -> TrainingImages:
    """A source of real images through the config's own training pipeline and preprocessor.

    Args:
        config: A config with a ``train_dataloader``; validation sets are never read here.
        model: Brings ``data_preprocessor``.
        size: Height and width; images are cropped or zero-padded to it at the bottom right, as batches are padded.
        seed: Which images are drawn, and in which order.

    Returns:
        Count to normalized images (count, C, height, width), each call going on where the last one stopped.

    Raises:
        ConfigError: The config has no training set, or one that reads the files of its test or validation set.
        DataError: It cannot be opened, or is empty.
    """
    loader = config.get('train_dataloader') or {}
    if not loader.get('dataset'):
        raise ConfigError(
            "dfq.source='real' needs train_dataloader.dataset in the config: name the training set, or use "
            "dfq.source='generated'"
        )
    check_no_overlap(config)
    from mmengine.registry import DATASETS

    try:
        dataset = DATASETS.build(loader['dataset'])
        dataset = getattr(dataset, 'full_init', lambda: None)() or dataset
    except OSError as error:
        raise DataError(
            f"the training set cannot be opened ({error}): check data_root, or use dfq.source='generated'"
        ) from error
    if len(dataset) == 0:
        raise DataError('the training set is empty: check data_root and the annotation file')
    return TrainingImages(dataset, model, size, seed)
