# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What a run shows: sheets of its samples. Reading images from a model's units is all it takes of the floors below."""
from .sheets import sample_sheet, to_pixels, write_png

__all__ = ['sample_sheet', 'to_pixels', 'write_png']
