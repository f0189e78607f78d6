# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Swin checkpoints of other releases, under the names of mmdet 3, mmseg 1 and mmpretrain."""

from psaq_mm.models.conversion.fit import Conversion, fit_weights
from psaq_mm.models.conversion.naming import Renamed, rename_swin, unfold_order

__all__ = ['Conversion', 'Renamed', 'fit_weights', 'rename_swin', 'unfold_order']
