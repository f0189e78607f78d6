# A detector of one project: a Swin with windows of 4, absolute positions, three outputs, a frozen first stage and activation
# checkpointing, on a data set that only this project can read.
_base_ = ['mmdet::_base_/models/faster-rcnn_r50_fpn.py', 'mmdet::_base_/default_runtime.py']
custom_imports = dict(imports=['welds'])
model = dict(
    backbone=dict(
        _delete_=True,
        type='SwinTransformer',
        pretrain_img_size=64,
        embed_dims=16,
        depths=[2, 2, 2, 2],
        num_heads=[1, 2, 4, 8],
        window_size=4,
        use_abs_pos_embed=True,
        out_indices=(1, 2, 3),
        frozen_stages=1,
        drop_path_rate=0.1,
        with_cp=True),
    neck=dict(in_channels=[32, 64, 128], out_channels=16, num_outs=3),
    rpn_head=dict(in_channels=16, feat_channels=16, anchor_generator=dict(strides=[8, 16, 32])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16, featmap_strides=[8, 16, 32]),
        bbox_head=dict(in_channels=16, fc_out_channels=32, num_classes=3)),
    test_cfg=dict(rpn=dict(max_per_img=20), rcnn=dict(score_thr=0., max_per_img=5)))

pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale=(64, 64), keep_ratio=False),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))
]
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='WeldDataset', data_root='data', ann_file='train.txt', data_prefix=dict(img='train'), pipeline=pipeline))
test_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='WeldDataset', data_root='data', ann_file='test.txt', data_prefix=dict(img='test'), pipeline=pipeline, test_mode=True))
val_dataloader = test_dataloader
val_evaluator = dict(type='VOCMetric')
test_evaluator = val_evaluator
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=12)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.02, momentum=0.9))
