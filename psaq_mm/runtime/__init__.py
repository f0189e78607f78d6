# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Running an export with NumPy and one runtime (OpenVINO or ONNX Runtime): no PyTorch, no OpenMMLab library."""

from psaq_mm.runtime import backends as _backends  # noqa: F401 (they register themselves)
from psaq_mm.runtime.deployed import DeployedModel, load
from psaq_mm.runtime.predictions import Prediction
from psaq_mm.runtime.registry import RUNTIMES, Runtime, register_runtime, start

__all__ = ['RUNTIMES', 'DeployedModel', 'Prediction', 'Runtime', 'load', 'register_runtime', 'start']
