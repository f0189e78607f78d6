"""Code of a project that uses mmdet and knows nothing of psaq_mm."""
from .dataset import CLASSES, WeldDataset

__all__ = ['CLASSES', 'WeldDataset']
