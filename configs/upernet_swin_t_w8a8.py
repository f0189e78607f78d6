_base_ = ['./full_precision/upernet_swin_t.py', './_base_/quant/w8a8.py', './_base_/dfq/psaq_v2_ade20k.py']
model = dict(type='psaq_mm.Quantized', base_type={{_base_.model.type}}, quant={{_base_.quant}})
