# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What a run shows: sheets of its samples, how alike their patches are to a model, and a page about all of it."""
from .charts import Curve, area_chart
from .curves import Line, Panel, line_chart
from .densities import BlockDensity, similarity_densities
from .drawing import draw_detections, draw_label_map
from .page import Picture
from .report import ModelReport, Run, Scene, ShownMetric, write_report
from .sheets import sample_sheet, to_pixels, write_png, write_whole

__all__ = [
    'BlockDensity', 'Curve', 'Line', 'ModelReport', 'Panel', 'Picture', 'Run', 'Scene', 'ShownMetric', 'area_chart', 'draw_detections',
    'draw_label_map', 'line_chart', 'sample_sheet', 'similarity_densities', 'to_pixels', 'write_png', 'write_report', 'write_whole'
]
