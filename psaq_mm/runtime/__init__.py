# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Running an export with NumPy and one runtime (OpenVINO or ONNX Runtime): no PyTorch, no OpenMMLab library."""

from psaq_mm.runtime.deployed import RUNTIMES, DeployedModel, load

__all__ = ['RUNTIMES', 'DeployedModel', 'load']
