# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What every method does to a student, without synthesis: ranges and codes from pictures, and training."""

from psaq_mm.calibration.attention import find_attention, is_attention
from psaq_mm.calibration.blocks import BlockTaps, find_blocks
from psaq_mm.calibration.calibration import Calibration, CalibrationSettings
from psaq_mm.calibration.discrepancy import normalized_l1
from psaq_mm.calibration.guidance import sensitivity_loss
from psaq_mm.calibration.network import Network, check_size
from psaq_mm.calibration.pool import SamplePool
from psaq_mm.calibration.student import StepLosses, StudentTraining, TrainingSettings, take_pictures

__all__ = [
    'BlockTaps',
    'Calibration',
    'CalibrationSettings',
    'Network',
    'SamplePool',
    'StepLosses',
    'StudentTraining',
    'TrainingSettings',
    'check_size',
    'find_attention',
    'find_blocks',
    'is_attention',
    'normalized_l1',
    'sensitivity_loss',
    'take_pictures',
]
