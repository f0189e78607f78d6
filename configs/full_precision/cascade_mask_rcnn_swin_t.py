# Cascade Mask R-CNN with Swin-T after Swin's own mmdet 2 config (arXiv 2103.14030, section 4.2): box heads of four convolutions with
# SyncBN and one Linear, boxes decoded before a GIoU loss. mmdet 3 ships none.
_base_ = ['mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py', './_base_/ms_crop_3x_coco.py']
box_head = dict(
    type='Shared4Conv1FCBBoxHead',
    in_channels=256,
    conv_out_channels=256,
    fc_out_channels=1024,
    roi_feat_size=7,
    num_classes=80,
    norm_cfg=dict(type='SyncBN', requires_grad=True),
    reg_class_agnostic=False,
    reg_decoded_bbox=True,
    loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
    loss_bbox=dict(type='GIoULoss', loss_weight=10.0))
stds = [[0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067]]
model = dict(
    backbone=dict(
        _delete_=True,
        type='SwinTransformer',
        embed_dims=96,
        depths=[2, 2, 6, 2],
        num_heads=[3, 6, 12, 24],
        window_size=7,
        drop_path_rate=0.2,
        convert_weights=True,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_tiny_patch4_window7_224.pth')),
    neck=dict(in_channels=[96, 192, 384, 768]),
    roi_head=dict(bbox_head=[
        dict(bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_means=[0., 0., 0., 0.], target_stds=std), **box_head) for std in stds
    ]))
# Made by: tools/convert_checkpoint.py configs/full_precision/cascade_mask_rcnn_swin_t.py
#   https://github.com/SwinTransformer/storage/releases/download/v1.0.2/cascade_mask_rcnn_swin_tiny_patch4_window7.pth
#   --out checkpoints/cascade_mask_rcnn_swin_t.pth
load_from = 'checkpoints/cascade_mask_rcnn_swin_t.pth'
