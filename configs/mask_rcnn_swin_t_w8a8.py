_base_ = ['mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_amp-ms-crop-3x_coco.py', './_base_/quant/w8a8.py', './_base_/dfq/psaq_v2_coco.py']
model = dict(type='psaq_mm.Quantized', base_type={{_base_.model.type}}, quant={{_base_.quant}})
# mmdet's own checkpoint, not the papers' (theirs has other AP).
load_from = ('https://download.openmmlab.com/mmdetection/v2.0/swin/mask_rcnn_swin-t-p4-w7_fpn_fp16_ms-crop-3x_coco/'
             'mask_rcnn_swin-t-p4-w7_fpn_fp16_ms-crop-3x_coco_20210908_165006-90a4008c.pth')
