# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Sheets of samples, densities of patch similarity, charts, and pages that hold them."""

from psaq_mm.visualization.charts import STYLES, Line, Panel, area_chart, line_chart
from psaq_mm.visualization.densities import BlockDensity, similarity_densities
from psaq_mm.visualization.page import Picture, render
from psaq_mm.visualization.sheets import encode_png, sample_sheet, to_pixels, write_png

__all__ = [
    'STYLES',
    'BlockDensity',
    'Line',
    'Panel',
    'Picture',
    'area_chart',
    'encode_png',
    'line_chart',
    'render',
    'sample_sheet',
    'similarity_densities',
    'to_pixels',
    'write_png',
]
