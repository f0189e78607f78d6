from mmengine.config import read_base
from psaq_mm.models import Quantized

with read_base():
    from .pure_python_detector import *

model.update(type=Quantized, base_type=model.type, quant='psaq_v2_w4a8')
load_from = 'weld_detector.pth'
dfq = dict(preset='fast', batch_size=2, calibration_samples=2, pool_size=4, log_interval=1)
