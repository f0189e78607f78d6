"""What a model says of single scenes, as pictures for the report. The dataset and the model are the config's own."""

from typing import Dict, List, Mapping, NamedTuple, Sequence, Tuple

import numpy as np
import torch
from drawing import draw_detections, draw_label_map
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS
from torch import Tensor, nn

from psaq_mm.engine.building import build_model, set_scope
from psaq_mm.engine.checkpoint import load_weights
from psaq_mm.engine.config import full_precision_model_config
from psaq_mm.visualization import Picture

SCORE = 0.5  # detections less certain than this are not drawn
BACKGROUND = 'background'  # the class that is not painted


class Predicted(NamedTuple):
    """A scene under one model, or its ground truth.

    Attributes:
        picture: (H, W, 3), uint8, RGB: the drawing.
        words: What is on it, for those who do not see it.
    """

    picture: np.ndarray
    words: str


def scenes_of(config, count: int) -> List[Dict]:
    """The first ``count`` pictures of a config's test set, through its own pipeline, with their ground truth."""
    set_scope(config)
    dataset = DATASETS.build(config.test_dataloader.dataset)
    return [dataset[i] for i in range(min(count, len(dataset)))]


def build(config, checkpoint: Mapping, source: str, full_precision: bool) -> nn.Module:
    """The config's model with a checkpoint's weights, in eval mode."""
    model = build_model(config, full_precision_model_config(config.model) if full_precision else None)
    load_weights(model, checkpoint, source)
    model.eval()
    return model


def normalized(model: nn.Module, scenes: Sequence[Dict]) -> Tensor:
    """The scenes as the model's first layer gets them, (n, C, H, W)."""
    return model.data_preprocessor(pseudo_collate(list(scenes)), False)['inputs']


def _rgb(scene: Dict) -> np.ndarray:
    return scene['inputs'].permute(1, 2, 0).numpy()[..., ::-1].copy()  # the pipelines read BGR


def _names(labels: Sequence[int], classes: Sequence[str]) -> str:
    return ', '.join(classes[i] for i in labels) or 'nothing'


def _detected(scene: Dict, found, meta: Mapping, truth: bool) -> Predicted:
    classes, palette = meta['classes'], meta['palette']
    boxes = getattr(found.bboxes, 'tensor', found.bboxes).numpy()
    labels, masks = found.labels.tolist(), found.get('masks')
    if truth:
        masks, scores = masks.masks, None
    else:
        kept = found.scores >= SCORE
        boxes, labels, scores = boxes[kept.numpy()], found.labels[kept].tolist(), found.scores[kept].tolist()
        masks = masks[kept].numpy()
    picture = draw_detections(_rgb(scene), boxes, labels, classes, palette, scores, np.asarray(masks, dtype=bool))
    return Predicted(picture, _names(labels, classes))


def _segmented(scene: Dict, labels: Tensor, meta: Mapping) -> Predicted:
    labels = labels.squeeze(0).numpy()
    picture = draw_label_map(
        _rgb(scene),
        labels,
        [tuple(colour) for colour in meta['palette']],
        clear=[i for i, name in enumerate(meta['classes']) if name == BACKGROUND],
    )
    present = [i for i in np.unique(labels) if i < len(meta['classes']) and meta['classes'][i] != BACKGROUND]
    return Predicted(picture, _names(present, meta['classes']))


def ground_truth(scene: Dict, meta: Mapping) -> Predicted:
    """What a scene really shows."""
    sample = scene['data_samples']
    if 'gt_sem_seg' in sample:
        return _segmented(scene, sample.gt_sem_seg.data, meta)
    return _detected(scene, sample.gt_instances, meta, truth=True)


@torch.no_grad()
def predict(model: nn.Module, scenes: Sequence[Dict], meta: Mapping) -> List[Predicted]:
    """What a model says of each scene."""
    predicted = []
    for scene in scenes:
        sample = model.test_step(pseudo_collate([scene]))[0].cpu()
        if 'pred_sem_seg' in sample:
            predicted.append(_segmented(scene, sample.pred_sem_seg.data, meta))
        else:
            predicted.append(_detected(scene, sample.pred_instances, meta, truth=False))
    return predicted


def side_by_side(number: int, columns: Sequence[Tuple[str, Predicted]]) -> List[Picture]:
    """A scene under several models as pictures of the report."""
    return [Picture(p.picture, label, f'Scene {number + 1}, {label.lower()}: {p.words}') for label, p in columns]
