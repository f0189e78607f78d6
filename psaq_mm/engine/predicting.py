# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Predictions of a model in PyTorch for pictures of any size, in the form that exported models give."""

from typing import Any, Dict, List, Mapping, Optional

import numpy as np
import torch
from torch import Tensor, nn

from psaq_mm.contexts import evaluating, replaced
from psaq_mm.engine.in_memory import library_of
from psaq_mm.engine.inputs import set_input_
from psaq_mm.engine.pipelines import pipeline_steps
from psaq_mm.errors import DataError, UnsupportedModelError
from psaq_mm.models import TaskModel
from psaq_mm.models.task import reads_rgb
from psaq_mm.models.tasks import task_of
from psaq_mm.runtime import Prediction
from psaq_mm.runtime.detection.arrays import sigmoid, softmax
from psaq_mm.runtime.glue import label_map
from psaq_mm.runtime.predictions import class_name
from psaq_mm.runtime.preparation import Picture, Preparation, Prepared

__all__ = ['Predictor']


class Predictor:
    """A detector, segmentor or classifier that predicts for pictures.

    Pictures are prepared as an exported model prepares them. A classifier's and a network's logits become predictions
    in the same way too; a detector and a segmentor of OpenMMLab make theirs with their library's own ``predict``.

    Args:
        model: Student or full-precision model. It is not changed but for its device.
        config: A whole config, or of :func:`psaq_mm.engine.in_memory.config_of`.
        dataset_meta: Its classes and palette.
        device: Where it runs. Defaults to None, where it is.
    """

    def __init__(
        self, model: nn.Module, config: Mapping, dataset_meta: Mapping[str, Any], device: Optional[str] = None
    ):
        self.model = model if device is None else model.to(device)
        self.device = next(model.parameters()).device
        self.task, self.library = task_of(model), library_of(model)
        self.classes: List[str] = list(dataset_meta.get('classes') or ())
        self.palette = dataset_meta.get('palette')
        steps = pipeline_steps(config)
        with replaced(model, 'psaq_mm_input', getattr(model, 'psaq_mm_input', None)):
            if model.psaq_mm_input is None:
                set_input_(model, config, strict=False)
            spec = TaskModel(model, parts=()).image_spec
            self.prepare = Preparation(
                dict(
                    pipeline=steps.pipeline,
                    pad_divisor=steps.pad_divisor,
                    channels=spec.channels,
                    mean=spec.mean,
                    std=spec.std,
                    reverse_channels=reads_rgb(model) and spec.channels == 3,
                )
            )

    def __call__(self, picture: Picture) -> Prediction:
        """The prediction for a picture, (H, W, C) or the path of a file.

        Raises:
            DataError: It is no picture that the model takes.
            UnsupportedModelError: The model gives no boxes, no classes and no class of each pixel.
        """
        prepared = self.prepare(picture)
        images = torch.from_numpy(np.ascontiguousarray(prepared.image[None])).to(self.device)
        known: Dict[str, Any] = dict(size=prepared.info.original, classes=self.classes, palette=self.palette)
        with torch.no_grad(), evaluating(self.model):
            if self.task.num_classes(self.model):
                return self._classified(images, known)
            if self.task.whole_output(self.model) is not None:
                return self._segmented(images, prepared, known)
            if self.library:
                return self._of_library(images, prepared, known)
        raise UnsupportedModelError(
            f'{type(self.model).__name__} gives no boxes, no classes and no class of each pixel: give the whole model'
        )

    def _names(self, labels: np.ndarray) -> List[str]:
        return [class_name(self.classes, int(label)) for label in labels]

    def _classified(self, images: Tensor, known: Mapping[str, Any]) -> Prediction:
        fixed = TaskModel(self.model, parts=()).fixed_size
        if fixed is not None and tuple(images.shape[2:]) != tuple(fixed):
            height, width = images.shape[2:]
            raise DataError(
                f'a picture of {height} x {width} does not fit this model, which takes {fixed[0]} x {fixed[1]} alone: '
                'resize it, or give the model the config with its test pipeline'
            )
        logits = TaskModel(self.model, parts=()).run(images, with_logits=True).logits
        assert logits is not None
        array = logits[0].float().cpu().numpy()
        several = self.task.finish_settings(self.model, None, {}).get('several_labels')
        chances = (sigmoid if several else softmax)(array)
        labels = np.argsort(-chances, kind='stable')
        return Prediction(
            'classification',
            **known,
            labels=labels,
            scores=chances[labels],
            names=self._names(labels),
            logits=array,
            probabilities=chances,
        )

    def _segmented(self, images: Tensor, prepared: Prepared, known: Mapping[str, Any]) -> Prediction:
        network = self.task.whole_output(self.model)
        assert network is not None
        logits = network(images)[0].float().cpu().numpy()
        settings = self.task.finish_settings(self.model, None, dict(logits=(1, *logits.shape)))
        sizes = [tuple(images.shape[2:]), prepared.info.shape, prepared.info.original]
        labels = label_map(logits, sizes, settings['align_corners'], settings['labels'])
        return Prediction('segmentation', **known, label_map=labels, logits=logits)

    # ------------------------------------------------------------------ OpenMMLab
    def _of_library(self, images: Tensor, prepared: Prepared, known: Mapping[str, Any]) -> Prediction:
        sample = self.model(images, [self._sample(images, prepared)], mode='predict')[0]
        instances = getattr(sample, 'pred_instances', None)
        if instances is not None and 'bboxes' in instances:
            return self._detected(instances, known)
        if 'pred_sem_seg' in sample:
            labels = sample.pred_sem_seg.data.squeeze(0).cpu().numpy().astype(np.int64)
            return Prediction('segmentation', **known, label_map=labels)
        raise UnsupportedModelError(
            f'the predictions of {type(self.model).__name__} ({", ".join(sample.keys()) or "none"}) are no boxes and '
            'no class of each pixel: evaluate it with psaq-test'
        )

    def _sample(self, images: Tensor, prepared: Prepared) -> Any:
        """The data sample of a picture, without annotations."""
        (height, width), info = images.shape[2:], prepared.info
        meta: Dict[str, Any] = dict(
            img_shape=info.shape,
            ori_shape=info.original,
            scale_factor=info.scale,
            pad_shape=(height, width),
            batch_input_shape=(height, width),
            flip=False,
            flip_direction=None,
        )
        if self.library == 'mmseg':
            from mmseg.structures import SegDataSample

            meta['img_padding_size'] = (0, width - info.shape[1], 0, height - info.shape[0])
            return SegDataSample(metainfo=meta)
        from mmdet.structures import DetDataSample

        return DetDataSample(metainfo=meta)

    def _detected(self, instances: Any, known: Mapping[str, Any]) -> Prediction:
        arrays = {name: instances[name].detach().cpu().numpy() for name in ('bboxes', 'scores', 'labels')}
        order = np.argsort(-arrays['scores'], kind='stable')
        masks = instances.get('masks')
        labels = arrays['labels'][order].astype(np.int64)
        return Prediction(
            'detection',
            **known,
            boxes=arrays['bboxes'][order].astype(np.float32),
            scores=arrays['scores'][order].astype(np.float32),
            labels=labels,
            names=self._names(labels),
            masks=None if masks is None else masks.cpu().numpy().astype(bool)[order],
        )
