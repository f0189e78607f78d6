"""What a model says of single pictures, as pictures for the report. The dataset and the model are the config's own."""

from collections import Counter
from typing import Dict, List, Mapping, NamedTuple, Sequence, Tuple

import cv2
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
    """A picture under one model, or its ground truth.

    Attributes:
        picture: (H, W, 3), uint8, RGB: the drawing.
        words: What is on it, for those who do not see it.
    """

    picture: np.ndarray
    words: str


def pictures_of(config, count: int) -> List[Dict]:
    """``count`` pictures of a config's test set, evenly spread, through its own pipeline, with their ground truth."""
    set_scope(config)
    dataset = DATASETS.build(config.test_dataloader.dataset)
    count = min(count, len(dataset))
    return [dataset[(2 * i + 1) * len(dataset) // (2 * count)] for i in range(count)]


def build(config, checkpoint: Mapping, source: str, full_precision: bool) -> nn.Module:
    """The config's model with a checkpoint's weights, in eval mode."""
    model = build_model(config, full_precision_model_config(config.model) if full_precision else None)
    load_weights(model, checkpoint, source)
    model.eval()
    return model


def normalized(model: nn.Module, pictures: Sequence[Dict]) -> Tensor:
    """The pictures as the model's first layer gets them, (n, C, H, W)."""
    return model.data_preprocessor(pseudo_collate(list(pictures)), False)['inputs']


def _rgb(picture: Dict) -> np.ndarray:
    """The file itself: predictions and ground truth are in its pixels, whatever the pipeline made of it."""
    return cv2.imread(picture['data_samples'].img_path)[..., ::-1].copy()


def _names(labels: Sequence[int], classes: Sequence[str]) -> str:
    counts = Counter(classes[i] for i in labels)
    return ', '.join(f'{count} {name}' if count > 1 else name for name, count in counts.items()) or 'nothing'


def _detected(picture: Dict, found, meta: Mapping, truth: bool) -> Predicted:
    classes, palette = meta['classes'], meta['palette']
    boxes = getattr(found.bboxes, 'tensor', found.bboxes).numpy()
    labels, masks = found.labels.tolist(), found.get('masks')
    if truth:
        masks, scores = masks.masks, None
    else:
        kept = found.scores >= SCORE
        boxes, labels, scores = boxes[kept.numpy()], found.labels[kept].tolist(), found.scores[kept].tolist()
        masks = masks[kept].numpy()
    picture = draw_detections(_rgb(picture), boxes, labels, classes, palette, scores, np.asarray(masks, dtype=bool))
    return Predicted(picture, _names(labels, classes))


def _segmented(picture: Dict, labels: Tensor, meta: Mapping) -> Predicted:
    labels = labels.squeeze(0).numpy()
    picture = draw_label_map(
        _rgb(picture),
        labels,
        [tuple(colour) for colour in meta['palette']],
        clear=[i for i, name in enumerate(meta['classes']) if name == BACKGROUND],
    )
    present = [i for i in np.unique(labels) if i < len(meta['classes']) and meta['classes'][i] != BACKGROUND]
    return Predicted(picture, _names(present, meta['classes']))


def ground_truth(picture: Dict, meta: Mapping) -> Predicted:
    """What a picture really shows."""
    sample = picture['data_samples']
    if 'gt_sem_seg' in sample:
        return _segmented(picture, sample.gt_sem_seg.data, meta)
    return _detected(picture, sample.gt_instances, meta, truth=True)


@torch.no_grad()
def predict(model: nn.Module, pictures: Sequence[Dict], meta: Mapping) -> List[Predicted]:
    """What a model says of each picture."""
    predicted = []
    for picture in pictures:
        sample = model.test_step(pseudo_collate([picture]))[0].cpu()
        if 'pred_sem_seg' in sample:
            predicted.append(_segmented(picture, sample.pred_sem_seg.data, meta))
        else:
            predicted.append(_detected(picture, sample.pred_instances, meta, truth=False))
    return predicted


def side_by_side(number: int, columns: Sequence[Tuple[str, Predicted]]) -> List[Picture]:
    """A picture under several models as pictures of the report."""
    return [Picture(p.picture, label, f'Picture {number + 1}, {label.lower()}: {p.words}') for label, p in columns]
