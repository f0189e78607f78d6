# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Real images as a control: only on request, and only from a config's own training set."""
from typing import Callable, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psaq_mm.engine.data_overlap import check_no_overlap
from psaq_mm.errors import ConfigError, DataError

__all__ = ['training_images']


def training_images(config, model: nn.Module, size: Tuple[int, int], seed: int) -> Callable[[int], Tensor]:
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
        raise ConfigError('dfq.source=\'real\' needs train_dataloader.dataset in the config: name the training set, or use '
                          'dfq.source=\'generated\'')
    check_no_overlap(config)
    from mmengine.registry import DATASETS
    try:
        dataset = DATASETS.build(loader['dataset'])
        dataset = getattr(dataset, 'full_init', lambda: None)() or dataset
    except OSError as error:
        raise DataError(f'the training set cannot be opened ({error}): check data_root, or use dfq.source=\'generated\'') from error
    if len(dataset) == 0:
        raise DataError('the training set is empty: check data_root and the annotation file')
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    position = 0

    def take(count: int) -> Tensor:
        nonlocal position
        images = []
        for _ in range(count):
            item = dataset[order[position % len(order)]]
            position += 1
            batch = model.data_preprocessor(dict(inputs=[item['inputs']], data_samples=[item['data_samples']]), training=False)
            image = batch['inputs'][0].detach().cpu()[:, :size[0], :size[1]]
            images.append(F.pad(image, (0, size[1] - image.shape[2], 0, size[0] - image.shape[1])))
        return torch.stack(images)

    return take
