# The demo's UperNet, backbone quantized to W4A8 without data.
_base_ = ['./upernet_swin_demo.py', '../_base_/quant/w4a8.py', './_base_/data_free.py']
model = dict(type='psaq_mm.Quantized', base_type={{_base_.model.type}}, quant={{_base_.quant}})
load_from = 'demo/checkpoints/upernet_swin_demo.pth'
