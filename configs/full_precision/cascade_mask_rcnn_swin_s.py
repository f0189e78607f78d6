_base_ = ['./cascade_mask_rcnn_swin_t.py']
pretrained = 'https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_small_patch4_window7_224.pth'
model = dict(backbone=dict(depths=[2, 2, 18, 2], init_cfg=dict(checkpoint=pretrained)))
# Made by: tools/convert_checkpoint.py configs/full_precision/cascade_mask_rcnn_swin_s.py
#   https://github.com/SwinTransformer/storage/releases/download/v1.0.2/cascade_mask_rcnn_swin_small_patch4_window7.pth
#   --out checkpoints/cascade_mask_rcnn_swin_s.pth
load_from = 'checkpoints/cascade_mask_rcnn_swin_s.pth'
