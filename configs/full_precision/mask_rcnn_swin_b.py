# Mask R-CNN with Swin-B, which neither mmdet nor Swin's own releases have: mmdet's Swin-S in Swin-B's widths.
_base_ = ['mmdet::swin/mask-rcnn_swin-s-p4-w7_fpn_amp-ms-crop-3x_coco.py']
pretrained = 'https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_base_patch4_window7_224.pth'
model = dict(
    backbone=dict(embed_dims=128, num_heads=[4, 8, 16, 32], drop_path_rate=0.3, init_cfg=dict(checkpoint=pretrained)),
    neck=dict(in_channels=[128, 256, 512, 1024]))
load_from = 'checkpoints/mask_rcnn_swin_b.pth'  # your own: nobody has published one
