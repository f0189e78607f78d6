# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Detectors between and after their integer layers, in float32 with NumPy alone: proposals, RoIAlign, suppression of
boxes, masks. It computes what mmdet computes.
"""

from psaq_mm.runtime.detection.detector import Detections, Heads, ImageInfo, detect
from psaq_mm.runtime.detection.settings import DetectorSettings

__all__ = ['Detections', 'DetectorSettings', 'Heads', 'ImageInfo', 'detect']
