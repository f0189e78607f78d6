# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Real images as a control: only on request, and only from a config's own training set."""

from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from psaq_mm.engine.data_overlap import check_no_overlap
from psaq_mm.errors import ConfigError, DataError
from psaq_mm.pictures import ImageSpec, Source, register_source
from psaq_mm.pictures.base import Make, checked_size, mixed
from psaq_mm.registry import TASK_UTILS

__all__ = ['TrainingImages']


@register_source('real')
@TASK_UTILS.register_module()
class TrainingImages(Source):
    """Images of the config's own training set, through its pipeline and the model's preprocessor.

    Number n is the n-th image of an order that the seed decides; past the last image, the first comes again. An image
    is cropped or zero-padded at the bottom right, as batches are padded.

    Args:
        seed: As for :class:`~psaq_mm.pictures.Source`.

    Example:
        >>> source = TrainingImages()
        >>> source.open(model, config, seed=0)
        >>> images = source.draw(range(32), (224, 224), TaskModel(model).image_spec)
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self._dataset: Any = None
        self._model: Any = None
        self._orders: Dict[int, List[int]] = {}
        self._run_seed = 0

    def open(self, model: Any, config: Any, seed: int) -> None:
        """Build the dataset; see :meth:`psaq_mm.pictures.Source.open`.

        Raises:
            ConfigError: The config has no training set, or one that reads the files of its test or validation set.
            DataError: The training set cannot be opened, or is empty.
        """
        loader = config.get('train_dataloader') or {}
        if not loader.get('dataset'):
            raise ConfigError(
                "dfq.samples='real' needs train_dataloader.dataset in the config: name the training set, or use "
                "dfq.samples='generated'"
            )
        check_no_overlap(config)
        from mmengine.registry import DATASETS

        try:
            dataset = DATASETS.build(loader['dataset'])
            dataset = getattr(dataset, 'full_init', lambda: None)() or dataset
        except OSError as error:
            raise DataError(
                f"the training set cannot be opened ({error}): check data_root, or use dfq.samples='generated'"
            ) from error
        if len(dataset) == 0:
            raise DataError('the training set is empty: check data_root and the annotation file')
        self._dataset, self._model, self._run_seed = dataset, model, seed
        self._orders.clear()

    def draw(
        self,
        numbers: Sequence[int],
        size: Tuple[int, int],
        image_spec: ImageSpec,
        seed: int = 0,
        generated: Optional[Make] = None,
    ) -> Tensor:
        """See :meth:`psaq_mm.pictures.Source.draw`.

        Raises:
            DataError: The source was not opened.
        """
        height, width = checked_size(len(numbers), size)
        if self._dataset is None:
            raise DataError('real images are read by a run, which knows the training set: take another source here')
        images, order = [], self._order(mixed(seed, self.seed) if self.seed else seed)
        for number in numbers:
            item = self._dataset[order[number % len(order)]]
            batch = self._model.data_preprocessor(
                dict(inputs=[item['inputs']], data_samples=[item['data_samples']]), training=False
            )
            image = batch['inputs'][0].detach().cpu()[:, :height, :width]
            images.append(F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1])))
        return torch.stack(images)

    def _order(self, seed: int) -> List[int]:
        """Random order of the images for one seed."""
        if seed not in self._orders:
            # The run's first stream has the order that earlier releases gave it.
            seeded = self._run_seed if seed == mixed(self._run_seed) else seed % 2**32
            generator = torch.Generator().manual_seed(seeded)
            self._orders[seed] = torch.randperm(len(self._dataset), generator=generator).tolist()
        return self._orders[seed]
