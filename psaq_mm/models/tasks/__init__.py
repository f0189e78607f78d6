# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Tasks that psaq_mm knows, one class each. They import no model library."""

from psaq_mm.models.tasks.base import TASKS, Task, register_task, task_of, task_predicting
from psaq_mm.models.tasks.classification import Classification
from psaq_mm.models.tasks.detection import Detection
from psaq_mm.models.tasks.panoptic import Panoptic
from psaq_mm.models.tasks.queries import MaskQueries, QueryDetection, QuerySegmentation
from psaq_mm.models.tasks.segmentation import Segmentation
from psaq_mm.models.tasks.transformers import TransformersClassification, TransformersSegmentation

__all__ = [
    'TASKS',
    'Classification',
    'Detection',
    'MaskQueries',
    'Panoptic',
    'QueryDetection',
    'QuerySegmentation',
    'Segmentation',
    'Task',
    'TransformersClassification',
    'TransformersSegmentation',
    'register_task',
    'task_of',
    'task_predicting',
]
