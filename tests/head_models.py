"""Tiny models with heads of every kind, out of the libraries' own zoo configs, quantized and calibrated."""

import copy

import torch
from quick_builds import metafiles_read_once

from psaq_mm.models import TaskModel, quantize_model_
from psaq_mm.quantization import calibrate

SIZE = (64, 96)
SWIN = dict(type='SwinTransformer', embed_dims=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8], window_size=7)
CLASSES = 3
FPN = dict(
    type='FPN', in_channels=[32, 64, 128], out_channels=16, start_level=0, add_extra_convs='on_output', num_outs=5
)
QUERIES = dict(encoder=dict(num_layers=1), decoder=dict(num_layers=1), num_queries=10, test_cfg=dict(max_per_img=5))
"""One layer each of a DETR."""


def _swin(*stages):
    return dict(SWIN, out_indices=stages)


MODELS = dict(
    rtmdet=(
        'mmdet::rtmdet/rtmdet_l_8xb32-300e_coco.py',
        dict(
            backbone=_swin(1, 2, 3),
            neck=dict(FPN, num_outs=3),
            bbox_head=dict(
                # one convolution for all levels, a norm for each
                in_channels=16,
                feat_channels=16,
                stacked_convs=2,
                num_classes=CLASSES,
            ),
        ),
    ),
    condinst=(
        'mmdet::condinst/condinst_r50_fpn_ms-poly-90k_coco_instance.py',
        dict(
            backbone=_swin(1, 2, 3),
            neck=FPN,
            bbox_head=dict(in_channels=16, feat_channels=64, stacked_convs=1, num_classes=CLASSES),
            mask_head=dict(mask_feature_head=dict(in_channels=16, feat_channels=16, num_stacked_convs=1)),
            test_cfg=dict(score_thr=0.0),
        ),
    ),
    yolact=(
        'mmdet::yolact/yolact_r50_1xb8-55e_coco.py',
        dict(
            backbone=_swin(1, 2, 3),
            neck=FPN,
            bbox_head=dict(in_channels=16, feat_channels=16, num_protos=8, num_classes=CLASSES),
            mask_head=dict(
                in_channels=16,
                num_protos=8,
                num_classes=CLASSES,
                proto_channels=(16, 16, None, 8),
                proto_kernel_sizes=(3, 3, -2, 1),
            ),
            test_cfg=dict(score_thr=0.0),
        ),
    ),
    dyhead=(
        'mmdet::dyhead/atss_r50_fpn_dyhead_1x_coco.py',
        dict(
            backbone=_swin(1, 2, 3),
            neck=[
                dict(FPN, out_channels=32),
                dict(type='DyHead', in_channels=32, out_channels=32, num_blocks=1, zero_init_offset=False),
            ],
            bbox_head=dict(in_channels=32, feat_channels=32, num_classes=CLASSES),
            test_cfg=dict(score_thr=0.0),
        ),
    ),
    panoptic_fpn=(
        'mmdet::panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py',
        dict(
            backbone=_swin(0, 1, 2, 3),
            neck=dict(in_channels=[16, 32, 64, 128], out_channels=16),
            rpn_head=dict(in_channels=16, feat_channels=16),
            roi_head=dict(
                bbox_roi_extractor=dict(out_channels=16),
                mask_roi_extractor=dict(out_channels=16),
                bbox_head=dict(in_channels=16, fc_out_channels=16),
                mask_head=dict(in_channels=16, conv_out_channels=16, num_convs=1),
            ),
            semantic_head=dict(in_channels=16, inner_channels=32),
        ),
    ),
    detr=('mmdet::detr/detr_r50_8xb2-150e_coco.py', dict(backbone=_swin(3), neck=dict(in_channels=[128]), **QUERIES)),
    mask2former=(
        'mmseg::mask2former/mask2former_r50_8xb2-90k_cityscapes-512x1024.py',
        dict(
            backbone=_swin(0, 1, 2, 3),
            decode_head=dict(
                in_channels=[16, 32, 64, 128],
                num_queries=5,
                transformer_decoder=dict(num_layers=1),
                pixel_decoder=dict(encoder=dict(num_layers=1)),
            ),
        ),
    ),
    ocrnet=(
        'mmseg::ocrnet/ocrnet_r101-d8_4xb2-40k_cityscapes-512x1024.py',
        dict(
            backbone=_swin(2, 3),
            decode_head=[
                dict(
                    type='FCNHead',
                    in_channels=128,
                    in_index=1,
                    channels=16,
                    num_convs=1,
                    concat_input=False,
                    num_classes=CLASSES,
                    norm_cfg=dict(type='BN'),
                ),
                dict(
                    type='OCRHead',
                    in_channels=128,
                    in_index=1,
                    channels=16,
                    ocr_channels=8,
                    num_classes=CLASSES,
                    norm_cfg=dict(type='BN'),
                ),
            ],
        ),
    ),
    fcn=(
        'mmseg::fcn/fcn_r50-d8_4xb2-40k_cityscapes-512x1024.py',
        dict(
            backbone=_swin(2, 3),
            auxiliary_head=None,
            decode_head=dict(
                in_channels=128, in_index=1, channels=16, num_convs=1, num_classes=CLASSES, align_corners=True
            ),
        ),
    ),
)


def _mend(value):
    """Batch normalization that runs in one process."""
    if isinstance(value, dict):
        if value.get('type') == 'SyncBN':
            value['type'] = 'BN'
        for one in value.values():
            _mend(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            _mend(one)
    return value


def config_of(name, more=None):
    """The config of one of :data:`MODELS`."""
    from mmengine.config import Config

    path, changes = MODELS[name]
    with metafiles_read_once():
        config = Config.fromstring(f'_base_ = ["{path}"]\n', '.py')
    config.model.pop('pretrained', None)
    for part, value in {**changes, **(more or {})}.items():
        old = config.model.get(part)
        whole = not isinstance(value, dict) or not isinstance(old, dict) or 'type' in value
        if whole:
            config.model[part] = value
        else:
            config.merge_from_dict({f'model.{part}': value})
    _mend(config.model)
    return config


def lively(model, seed=0):
    """Weights and statistics that differ from channel to channel, as trained ones do; in evaluation mode."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random) * 0.05)
        for module in model.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(0, 0.2, generator=random)
                module.running_var.uniform_(0.5, 2, generator=random)
    return model.eval()


def build(settings, scope, seed=0):
    """A full-precision model of a config's text, whose weights depend on ``seed``."""
    from mmengine.registry import MODELS as registry
    from mmengine.registry import init_default_scope

    init_default_scope(scope)
    torch.manual_seed(seed)
    return lively(registry.build(copy.deepcopy(settings)), seed)


def student(model, quant='w8a8', size=SIZE):
    """The model, quantized and calibrated in place, and two images."""
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    quantize_model_(model, quant)
    calibrate(model, lambda: TaskModel(model).calibration_forward(images, model.quant_spec.scope), allow_unseen=True)
    return images


def samples(library, size=SIZE, count=1):
    """Metainfo as the libraries' test pipelines give it."""
    if library == 'mmdet':
        from mmdet.structures import DetDataSample as Sample
    elif library == 'mmseg':
        from mmseg.structures import SegDataSample as Sample
    else:
        from mmpretrain.structures import DataSample as Sample
    meta = dict(img_shape=size, ori_shape=size, pad_shape=size, batch_input_shape=size, scale_factor=(1.0, 1.0))
    return [Sample(metainfo=dict(meta)) for _ in range(count)]
