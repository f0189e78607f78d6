# The same detector as weld_detector.py in MMEngine's pure-Python form, as mmdet.configs has it: types are classes that are imported,
# bases are read by read_base, and there is no default scope.
from mmcv.transforms import LoadImageFromFile
from mmdet.datasets.transforms import LoadAnnotations, PackDetInputs, Resize
from mmdet.evaluation import VOCMetric
from mmdet.models import FasterRCNN, SwinTransformer
from mmdet.visualization import DetLocalVisualizer
from mmengine.config import read_base
from mmengine.dataset import DefaultSampler, pseudo_collate
from mmengine.hooks import CheckpointHook, EMAHook, LoggerHook
from mmengine.model import PretrainedInit
from mmengine.optim import OptimWrapper
from mmengine.runner import EpochBasedTrainLoop, LogProcessor, TestLoop, ValLoop
from mmengine.visualization import LocalVisBackend
from torch.optim import SGD
from welds import CLASSES, WeldDataset

with read_base():
    from ._base_.faster_rcnn import *

default_scope = None
custom_hooks = [dict(type=EMAHook, momentum=0.001)]
default_hooks = dict(logger=dict(type=LoggerHook, interval=50), checkpoint=dict(type=CheckpointHook, interval=1))
log_processor = dict(type=LogProcessor, window_size=50, by_epoch=True)
visualizer = dict(type=DetLocalVisualizer, vis_backends=[dict(type=LocalVisBackend)], name='visualizer')
model.update(
    dict(
        type=FasterRCNN,
        backbone=dict(
            type=SwinTransformer,
            pretrain_img_size=64,
            embed_dims=16,
            depths=[2, 2, 2, 2],
            num_heads=[1, 2, 4, 8],
            window_size=4,
            use_abs_pos_embed=True,
            out_indices=(1, 2, 3),
            frozen_stages=1,
            drop_path_rate=0.1,
            with_cp=True,
            init_cfg=dict(type=PretrainedInit, checkpoint='not_there.pth'))))

pipeline = [
    dict(type=LoadImageFromFile),
    dict(type=LoadAnnotations, with_bbox=True),
    dict(type=Resize, scale=(64, 64), keep_ratio=False),
    dict(type=PackDetInputs, meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))
]
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    sampler=dict(type=DefaultSampler, shuffle=True),
    dataset=dict(type=WeldDataset, data_root='data', ann_file='train.txt', data_prefix=dict(img='train'), metainfo=dict(classes=CLASSES),
                 pipeline=pipeline))
test_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type=DefaultSampler, shuffle=False),
    collate_fn=dict(type=pseudo_collate),
    dataset=dict(type=WeldDataset, data_root='data', ann_file='test.txt', data_prefix=dict(img='test'), pipeline=pipeline, test_mode=True))
val_dataloader = test_dataloader
val_evaluator = dict(type=VOCMetric)
test_evaluator = val_evaluator
train_cfg = dict(type=EpochBasedTrainLoop, max_epochs=12)
val_cfg = dict(type=ValLoop)
test_cfg = dict(type=TestLoop)
optim_wrapper = dict(type=OptimWrapper, optimizer=dict(type=SGD, lr=0.02, momentum=0.9))
