_base_ = ['./upernet_swin_camvid.py', './_base_/quant/w8a8.py']
model = dict(type='psaq_mm.Quantized', base_type={{_base_.model.type}}, quant={{_base_.quant}})
# Trained by demo/train_full_precision.py; the pictures' licence does not allow passing the weights on.
load_from = 'work_dirs/real/upernet_swin_camvid.pth'
dfq = dict(preset='psaq_v2', size=(256, 256), batch_size=4, calibration_samples=16, pool_size=64, evolve_every=50,
           evolve_samples=8, iters=60, generator=dict(batch_size=8, steps=20))
