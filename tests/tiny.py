"""Tiny detectors and segmentors out of the libraries' own zoo configs, as config files and checkpoints on disk."""

from pathlib import Path

import torch

WITHOUT_TORCH = """\
import sys
class Refuse:
    def find_spec(self, name, *args):
        if name.split('.')[0] in ('torch', 'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'timm', 'onnx'):
            raise ImportError(f'{name} is not here')
sys.meta_path.insert(0, Refuse())
"""
# The first lines of a script that runs where neither PyTorch nor an OpenMMLab library nor onnx is installed.

DETECTOR = """
_base_ = ['mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py']
model = dict(
    backbone=dict(embed_dims=16, depths=[2, 2, 1, 1], num_heads=[1, 2, 4, 8]),
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=16),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16), mask_roi_extractor=dict(out_channels=16),
        bbox_head=dict(in_channels=16, fc_out_channels=32),
        mask_head=dict(in_channels=16, conv_out_channels=16, num_convs=1)))
"""

CASCADE = """
_base_ = ['mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py']
norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    backbone=dict(
        _delete_=True, type='SwinTransformer', embed_dims=16, depths=[2, 2, 1, 1], num_heads=[1, 2, 4, 8],
        window_size=7, drop_path_rate=0.2, convert_weights=True),
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=16),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16), mask_roi_extractor=dict(out_channels=16),
        bbox_head=[dict(
            type='ConvFCBBoxHead', num_shared_convs=4, num_shared_fcs=1, in_channels=16, conv_out_channels=16,
            fc_out_channels=32, roi_feat_size=7, num_classes=80, norm_cfg=norm_cfg,
            reg_class_agnostic=False, reg_decoded_bbox=True,
            bbox_coder=dict(
                type='DeltaXYWHBBoxCoder', target_means=[0., 0., 0., 0.],
                target_stds=[0.1 / d, 0.1 / d, 0.2 / d, 0.2 / d]),
            loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
            loss_bbox=dict(type='GIoULoss', loss_weight=10.0)) for d in (1, 2, 3)],
        mask_head=dict(in_channels=16, conv_out_channels=16, num_convs=1)))
"""
"""Cascade Mask R-CNN with the box heads of Swin's own releases (4 convolutions, 1 Linear, GIoU loss), which mmdet 3 has
no config for; their SyncBN is BN here, which runs without a process group."""

SEGMENTOR = """
_base_ = ['mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py']
norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    data_preprocessor=dict(size=(64, 96)),
    backbone=dict(embed_dims=16, depths=[2, 2, 1, 1], num_heads=[1, 2, 4, 8]),
    decode_head=dict(in_channels=[16, 32, 64, 128], channels=16, num_classes=5, norm_cfg=norm_cfg),
    auxiliary_head=dict(in_channels=64, channels=16, num_classes=5, norm_cfg=norm_cfg))
"""

QUANTIZED = """
_base_ = ['{base}']
model = dict(type='psaq_mm.Quantized', base_type={{{{_base_.model.type}}}}, quant={quant!r})
load_from = {load_from!r}
dfq = {dfq!r}
"""

DFQ = dict(
    size=(64, 96),
    batch_size=2,
    calibration_samples=2,
    pool_size=6,
    evolve_every=2,
    evolve_samples=2,
    iters=4,
    checkpoint_interval=2,
    sheet_interval=2,
    log_interval=1,
    summary_pictures=0,
    generator=dict(batch_size=2, steps=2),
)
"""The shortest run that passes through every part: two rounds of synthesis, four student steps."""


def build_full_precision(config, seed=0):
    """The full-precision model of a config, with random weights of a trained model's size."""
    from psaq_mm.engine.building import build_model

    torch.manual_seed(seed)
    model = build_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


class Project:
    """A user's folder: a full-precision config, its checkpoint, and a config that quantizes it in three statements.

    Args:
        folder: Where it is made.
        base: :data:`DETECTOR`, :data:`CASCADE` or :data:`SEGMENTOR`.
    """

    def __init__(self, folder: Path, base: str = DETECTOR):
        from mmengine.config import Config

        self.folder = Path(folder)
        self.base = self.folder / 'full_precision.py'
        self.base.write_text(base)
        self.checkpoint = self.folder / 'full_precision.pth'
        model = build_full_precision(Config.fromfile(self.base))
        meta = dict(dataset_meta=dict(classes=('bolt', 'nut'), palette=[(1, 2, 3), (4, 5, 6)]))
        torch.save(dict(state_dict=model.state_dict(), meta=meta), self.checkpoint)

    def config(self, quant='w8a8', name='quantized.py', load_from='checkpoint', **dfq) -> Path:
        """Write a quantized config; ``load_from=None`` leaves the checkpoint out."""
        path = self.folder / name
        load = str(self.checkpoint) if load_from == 'checkpoint' else load_from
        path.write_text(QUANTIZED.format(base=self.base.name, quant=quant, load_from=load, dfq={**DFQ, **dfq}))
        return path


def calibrated_student(project: Project, quant, size=(64, 96), steps=None):
    """A student of a project, calibrated on noise, as a checkpoint on disk.

    Args:
        project: With its full-precision model.
        quant: Precision.
        size: (height, width) of the noise.
        steps: Of a test pipeline in place of the zoo config's, between loading and packing.

    Returns:
        Its config, the path of its checkpoint, the model.
    """
    from psaq_mm.commands.common import load_config
    from psaq_mm.engine.building import build_model
    from psaq_mm.engine.checkpoint import load_weights, read_checkpoint, save_atomic, student_checkpoint
    from psaq_mm.models import TaskModel
    from psaq_mm.quantization import calibrate

    config = load_config(str(project.config(quant)))
    if steps is not None:
        pipeline = config.test_dataloader.dataset.pipeline
        config.test_dataloader.dataset.pipeline = [pipeline[0], *steps, pipeline[-1]]
        config.test_pipeline = config.test_dataloader.dataset.pipeline
    model = build_model(config)
    load_weights(model, read_checkpoint(project.checkpoint), project.checkpoint)
    model.eval()
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    calibrate(model, lambda: TaskModel(model).calibration_forward(images, model.quant_spec.scope), allow_unseen=True)
    path = project.folder / 'student.pth'
    meta = dict(classes=('bolt', 'nut'))
    save_atomic(student_checkpoint(model, config.pretty_text, meta, (project.checkpoint, ''), {}), path)
    return config, path, model
