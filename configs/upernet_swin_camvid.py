# Full-precision UperNet with a small Swin on CamVid (367/101/233 street scenes, 480 x 360), trained from scratch.
# The data lie under $PSAQ_MM_DATA/camvid/{images,annotations}/{train,val,test} (default: data/camvid/...).
_base_ = ['./demo/upernet_swin_demo.py']
data_root = '{{$PSAQ_MM_DATA:data}}/camvid'
metainfo = dict(
    classes=('sky', 'building', 'pole', 'road', 'pavement', 'tree', 'sign', 'fence', 'car', 'pedestrian', 'bicyclist'),
    palette=[[128, 128, 128], [128, 0, 0], [192, 192, 128], [128, 64, 128], [60, 40, 222], [128, 128, 0],
             [192, 128, 128], [64, 64, 128], [64, 0, 128], [64, 64, 0], [0, 128, 192]])
void = 11  # the label of pixels of no class: no loss, no metric, and what padding and cropping fill with

loss_decode = dict(type='CrossEntropyLoss', use_sigmoid=False, avg_non_ignore=True, loss_weight=1.0)
model = dict(
    data_preprocessor=dict(size=(240, 240), seg_pad_val=void),
    backbone=dict(init_cfg=None),
    decode_head=dict(num_classes=11, ignore_index=void, loss_decode=loss_decode),
    auxiliary_head=dict(num_classes=11, ignore_index=void, loss_decode=dict(avg_non_ignore=True)))

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=(480, 360), ratio_range=(0.75, 1.5), keep_ratio=True),
    dict(type='RandomCrop', crop_size=(240, 240), cat_max_ratio=0.75, ignore_index=void),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs')
]
dataset = dict(data_root=data_root, metainfo=metainfo, img_suffix='.jpg', ignore_index=void)
train_dataloader = dict(
    batch_size=4,
    dataset=dict(
        data_prefix=dict(img_path='images/train', seg_map_path='annotations/train'), pipeline=train_pipeline, **dataset))
val_dataloader = dict(
    batch_size=4, dataset=dict(data_prefix=dict(img_path='images/val', seg_map_path='annotations/val'), **dataset))
test_dataloader = dict(
    batch_size=4, dataset=dict(data_prefix=dict(img_path='images/test', seg_map_path='annotations/test'), **dataset))
val_evaluator = dict(ignore_index=void)
test_evaluator = val_evaluator

max_iters = 700
train_cfg = dict(max_iters=max_iters, val_interval=350)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=60),
    dict(type='CosineAnnealingLR', eta_min=0., by_epoch=False, begin=60, end=max_iters)
]
default_hooks = dict(checkpoint=dict(interval=350))
