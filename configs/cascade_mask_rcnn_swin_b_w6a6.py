_base_ = ['./full_precision/cascade_mask_rcnn_swin_b.py', './_base_/quant/w6a6.py', './_base_/dfq/psaq_v2_coco.py']
model = dict(type='psaq_mm.Quantized', base_type={{_base_.model.type}}, quant={{_base_.quant}})
