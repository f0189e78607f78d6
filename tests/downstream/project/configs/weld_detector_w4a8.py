_base_ = ['./weld_detector.py']
model = dict(type='psaq_mm.Quantized', base_type={{_base_.model.type}}, quant='psaq_v2_w4a8')
load_from = 'weld_detector.pth'
dfq = dict(preset='psaq_v2', batch_size=2, calibration_samples=2, pool_size=4, evolve_every=2, evolve_samples=2, iters=4, log_interval=1,
           checkpoint_interval=0, sheet_interval=0, generator=dict(batch_size=2, steps=2))
