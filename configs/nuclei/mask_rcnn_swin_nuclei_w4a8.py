# The Mask R-CNN of the cells, backbone quantized to W4A8 without data.
_base_ = ['./mask_rcnn_swin_nuclei.py', '../_base_/quant/w4a8.py']
model = dict(type='psaq_mm.Quantized', base_type={{_base_.model.type}}, quant={{_base_.quant}})
load_from = 'demo/checkpoints/mask_rcnn_swin_nuclei.pth'
dfq = dict(preset='best', size=(512, 512), batch_size=4)
