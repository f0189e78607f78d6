# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What a run shows: sheets of its samples, how alike their patches are to a model, and a page about all of it."""

from psaq_mm.visualization.charts import Curve, area_chart
from psaq_mm.visualization.curves import Line, Panel, line_chart
from psaq_mm.visualization.densities import BlockDensity, similarity_densities
from psaq_mm.visualization.drawing import draw_detections, draw_label_map
from psaq_mm.visualization.page import Picture
from psaq_mm.visualization.report import ModelReport, Run, Scene, ShownMetric, write_report
from psaq_mm.visualization.sheets import sample_sheet, to_pixels, write_png, write_whole

__all__ = [
    'BlockDensity',
    'Curve',
    'Line',
    'ModelReport',
    'Panel',
    'Picture',
    'Run',
    'Scene',
    'ShownMetric',
    'area_chart',
    'draw_detections',
    'draw_label_map',
    'line_chart',
    'sample_sheet',
    'similarity_densities',
    'to_pixels',
    'write_png',
    'write_report',
    'write_whole',
]
