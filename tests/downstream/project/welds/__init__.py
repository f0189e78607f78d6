"""Code of a project that uses mmdet and knows nothing of psaq_mm."""
from .dataset import WeldDataset

__all__ = ['WeldDataset']
