# Full-precision UperNet with a small Swin on the scenes of demo/scenes.py, trained from scratch.
_base_ = [
    'mmseg::_base_/models/upernet_swin.py', 'mmseg::_base_/default_runtime.py', './_base_/scenes_segmentation.py',
    './_base_/schedule.py'
]
channels = 64
norm_cfg = dict(type='BN', requires_grad=True)  # SyncBN does not train on one CPU process
model = dict(
    data_preprocessor=dict(size=(128, 128)),
    backbone=dict(embed_dims=32, depths=[2, 2, 4, 2], num_heads=[2, 4, 8, 16], drop_path_rate=0.05),
    decode_head=dict(in_channels=[32, 64, 128, 256], channels=channels, num_classes=7, norm_cfg=norm_cfg),
    auxiliary_head=dict(in_channels=128, channels=channels, num_classes=7, norm_cfg=norm_cfg))

max_iters = 2500
train_cfg = dict(max_iters=max_iters, val_interval=500)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type='CosineAnnealingLR', eta_min=0., by_epoch=False, begin=100, end=max_iters)
]
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=500, max_keep_ckpts=1),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='SegVisualizationHook'))
