# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Quantized models of the OpenMMLab libraries. Importing it registers the builders; it imports none of the
libraries.
"""

from psaq_mm.models import sources
from psaq_mm.models.backbones import QuantSwinTransformer
from psaq_mm.models.quantized import Quantized, quantize_model_, report_of, spec_of
from psaq_mm.models.rotation import RotationReport, rotate_model_
from psaq_mm.models.task import TaskModel

__all__ = [
    'Quantized',
    'QuantSwinTransformer',
    'RotationReport',
    'TaskModel',
    'quantize_model_',
    'report_of',
    'rotate_model_',
    'sources',
    'spec_of',
]
