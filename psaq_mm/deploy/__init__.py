# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Integer export (ONNX with QuantizeLinear and DequantizeLinear) and the runtimes that run it.

:func:`load` needs numpy and one runtime, and imports neither PyTorch nor an OpenMMLab library; :func:`export_model`
needs PyTorch and onnx, :func:`write_plain_onnx` onnx alone, and both are imported when they are asked for.
"""

from psaq_mm.runtime import RUNTIMES, DeployedModel, Prediction, load

__all__ = ['RUNTIMES', 'DeployedModel', 'Prediction', 'export_model', 'load', 'write_plain_onnx']


def __getattr__(name: str):
    if name == 'export_model':
        from psaq_mm.deploy.export import export_model

        return export_model
    if name == 'write_plain_onnx':
        from psaq_mm.deploy.plain_onnx import write_plain_onnx

        return write_plain_onnx
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
