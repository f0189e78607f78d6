# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What every method does to a student: calibrate its ranges on pictures, weigh rows by importance, round its weights."""

from psaq_mm.calibration.attention import find_attention, is_attention
from psaq_mm.calibration.blocks import BlockTaps, find_blocks
from psaq_mm.calibration.discrepancy import normalized_l1
from psaq_mm.calibration.guidance import sensitivity_loss

__all__ = ['BlockTaps', 'find_attention', 'find_blocks', 'is_attention', 'normalized_l1', 'sensitivity_loss']
