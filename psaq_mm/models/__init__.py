# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Quantized models of the OpenMMLab libraries. Importing it registers the builders; it imports none of the libraries."""
from .backbones import QuantSwinTransformer
from .deployed import DeployedBackbone, deploy_model_
from .quantized import Quantized, quantize_model_, report_of, spec_of
from .rotation import RotationReport, rotate_model_
from .task import TaskModel
from . import sources

__all__ = ['DeployedBackbone', 'Quantized', 'QuantSwinTransformer', 'RotationReport', 'TaskModel', 'deploy_model_', 'quantize_model_',
           'report_of', 'rotate_model_', 'sources', 'spec_of']
