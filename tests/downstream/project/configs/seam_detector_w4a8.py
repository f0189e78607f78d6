_base_ = ['./seam_detector.py']
custom_imports = dict(imports=['welds', 'welds.seam_net', 'welds.seam_net_quant'])
model = dict(type='psaq_mm.Quantized', base_type={{_base_.model.type}}, quant='repq_w4a8')
load_from = 'seam_detector.pth'
dfq = dict(preset='fast', calibration_samples=2, batch_size=2)
