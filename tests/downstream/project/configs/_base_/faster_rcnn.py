from mmcv.ops import RoIAlign, nms
from mmdet.models import (FPN, CrossEntropyLoss, DetDataPreprocessor, FasterRCNN, L1Loss, RPNHead, Shared2FCBBoxHead, SingleRoIExtractor,
                          StandardRoIHead)
from mmdet.models.task_modules import AnchorGenerator, DeltaXYWHBBoxCoder
from welds import CLASSES

coder = dict(type=DeltaXYWHBBoxCoder, target_means=[0., 0., 0., 0.])
model = dict(
    type=FasterRCNN,
    data_preprocessor=dict(
        type=DetDataPreprocessor, mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True, pad_size_divisor=32),
    neck=dict(type=FPN, in_channels=[32, 64, 128], out_channels=16, num_outs=3),
    rpn_head=dict(
        type=RPNHead,
        in_channels=16,
        feat_channels=16,
        anchor_generator=dict(type=AnchorGenerator, scales=[8], ratios=[0.5, 1.0, 2.0], strides=[8, 16, 32]),
        bbox_coder=dict(**coder, target_stds=[1., 1., 1., 1.]),
        loss_cls=dict(type=CrossEntropyLoss, use_sigmoid=True, loss_weight=1.0),
        loss_bbox=dict(type=L1Loss, loss_weight=1.0)),
    roi_head=dict(
        type=StandardRoIHead,
        bbox_roi_extractor=dict(
            type=SingleRoIExtractor,
            roi_layer=dict(type=RoIAlign, output_size=7, sampling_ratio=0),
            out_channels=16,
            featmap_strides=[8, 16, 32]),
        bbox_head=dict(
            type=Shared2FCBBoxHead,
            in_channels=16,
            fc_out_channels=32,
            roi_feat_size=7,
            num_classes=3,
            bbox_coder=dict(**coder, target_stds=[0.1, 0.1, 0.2, 0.2]),
            reg_class_agnostic=False,
            loss_cls=dict(type=CrossEntropyLoss, use_sigmoid=False, loss_weight=1.0),
            loss_bbox=dict(type=L1Loss, loss_weight=1.0))),
    train_cfg=None,
    test_cfg=dict(
        rpn=dict(nms_pre=1000, max_per_img=20, nms=dict(type=nms, iou_threshold=0.7), min_bbox_size=0),
        rcnn=dict(score_thr=0., nms=dict(type=nms, iou_threshold=0.5), max_per_img=5)))
dataset_meta = dict(classes=CLASSES)
