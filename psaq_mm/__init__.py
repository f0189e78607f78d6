"""Quantization of vision transformers in OpenMMLab without real data."""

__version__ = '0.2.0'
