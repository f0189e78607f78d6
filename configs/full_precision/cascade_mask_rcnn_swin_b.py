_base_ = ['./cascade_mask_rcnn_swin_s.py']
pretrained = 'https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_base_patch4_window7_224.pth'
model = dict(
    backbone=dict(embed_dims=128, num_heads=[4, 8, 16, 32], drop_path_rate=0.3, init_cfg=dict(checkpoint=pretrained)),
    neck=dict(in_channels=[128, 256, 512, 1024]))
# Made by: tools/convert_checkpoint.py configs/full_precision/cascade_mask_rcnn_swin_b.py
#   https://github.com/SwinTransformer/storage/releases/download/v1.0.2/cascade_mask_rcnn_swin_base_patch4_window7.pth
#   --out checkpoints/cascade_mask_rcnn_swin_b.pth
load_from = 'checkpoints/cascade_mask_rcnn_swin_b.pth'
