# Cells under the microscope: the Data Science Bowl 2018 set (CC0) as a COCO data set with one class. The test part comes
# with the repository, the training part lies under $PSAQ_MM_DATA/nuclei/{images,annotations} (default: data/nuclei/...).
# Every picture is made 512 pixels high (or as high as 1024 in width allows), in training by 0.6 to 1.4 times that.
train_root = '{{$PSAQ_MM_DATA:data}}/nuclei/'
test_root = 'demo/nuclei/'
metainfo = dict(classes=('nucleus', ), palette=[(90, 200, 120)])

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='RandomResize', scale=(1024, 512), ratio_range=(0.6, 1.4), keep_ratio=True),
    dict(type='RandomCrop', crop_size=(224, 224), allow_negative_crop=True),
    dict(type='RandomFlip', prob=[0.25, 0.25, 0.25], direction=['horizontal', 'vertical', 'diagonal']),
    dict(type='PhotoMetricDistortion', brightness_delta=24, contrast_range=(0.7, 1.3)),
    dict(type='PackDetInputs')
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(1024, 512), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))
]
train_dataloader = dict(
    batch_size=4,
    num_workers=1,  # every mask of a picture is resized before the crop: a quarter of a second a batch
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type='CocoDataset',
        data_root=train_root,
        metainfo=metainfo,
        ann_file='annotations/train.json',
        data_prefix=dict(img='images/'),
        filter_cfg=dict(filter_empty_gt=True),
        pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='CocoDataset',
        data_root=test_root,
        metainfo=metainfo,
        ann_file='annotations/val.json',
        data_prefix=dict(img='images/'),
        test_mode=True,
        pipeline=test_pipeline))
test_dataloader = val_dataloader

val_evaluator = dict(type='CocoMetric', ann_file=test_root + 'annotations/val.json', metric=['bbox', 'segm'])
test_evaluator = val_evaluator
