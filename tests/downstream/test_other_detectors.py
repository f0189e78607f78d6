"""One-stage detectors and the DETR family with a Swin backbone, and what is refused by name when the model is built."""

import pytest
import torch
from quick_builds import WeightsWithoutMemory, metafiles_read_once
from tiny import Project

from psaq_mm.commands.dfq_train import main as dfq_train
from psaq_mm.engine.checkpoint import read_checkpoint
from psaq_mm.errors import UnsupportedModelError
from psaq_mm.models import TaskModel, quantize_model_
from psaq_mm.quantization import is_quantizer_key

pytest.importorskip('mmdet')
pytestmark = pytest.mark.filterwarnings('ignore')

SWIN = """dict(_delete_=True, type='SwinTransformer', embed_dims=16, depths=[2, 2, 1, 1], num_heads=[1, 2, 4, 8],
                  window_size=7, out_indices={out}, drop_path_rate=0.2)"""
TRANSFORMER = 'encoder=dict(num_layers=1), decoder=dict(num_layers=1), num_queries=10, test_cfg=dict(max_per_img=5)'
DETECTORS = dict(
    retinanet=f"""
_base_ = ['mmdet::retinanet/retinanet_r50_fpn_1x_coco.py']
model = dict(
    backbone={SWIN.format(out=(1, 2, 3))}, neck=dict(in_channels=[32, 64, 128], out_channels=16, start_level=0),
    bbox_head=dict(in_channels=16, feat_channels=16, stacked_convs=1))
""",
    atss=f"""
_base_ = ['mmdet::atss/atss_r50_fpn_1x_coco.py']
model = dict(
    backbone={SWIN.format(out=(1, 2, 3))}, neck=dict(in_channels=[32, 64, 128], out_channels=16, start_level=0),
    bbox_head=dict(in_channels=16, feat_channels=64, stacked_convs=1))
""",
    detr=f"""
_base_ = ['mmdet::detr/detr_r50_8xb2-150e_coco.py']
model = dict(backbone={SWIN.format(out=(3,))}, neck=dict(in_channels=[128]), {TRANSFORMER})
""",
    dino=f"""
_base_ = ['mmdet::dino/dino-5scale_swin-l_8xb2-12e_coco.py']
model = dict(backbone={SWIN.format(out=(0, 1, 2, 3))}, neck=dict(in_channels=[16, 32, 64, 128]), {TRANSFORMER})
""",
)
BEHIND_THE_NECK = dict(detr=('encoder', 'decoder'), dino=('encoder', 'decoder', 'memory_trans_fc'))


@pytest.fixture(scope='module', autouse=True)
def quick_configs():
    with metafiles_read_once():
        yield


@pytest.fixture(scope='module', params=list(DETECTORS))
def detector(request, tmp_path_factory):
    project = Project(tmp_path_factory.mktemp(request.param), DETECTORS[request.param])
    project.name = request.param
    content = torch.load(project.checkpoint)
    if 'level_embed' in content['state_dict']:  # left as memory was by the constructor
        content['state_dict']['level_embed'].normal_(generator=torch.Generator().manual_seed(0))
        torch.save(content, project.checkpoint)
    return project


def test_scope_backbone(detector):
    """Quantized by inheritance, saved, and served by the library."""
    from mmdet.apis import inference_detector, init_detector

    path = detector.config(quant='w4a8', iters=1, evolve_every=0)
    assert dfq_train([str(path), '--work-dir', str(detector.folder / 'work')]) == 0
    student = detector.folder / 'work' / 'student.pth'
    state = read_checkpoint(student)['state_dict']
    assert {key.split('.')[0] for key in state if is_quantizer_key(key)} == {'backbone'}
    assert all(bool(value) for key, value in state.items() if key.endswith('_quantizer.calibrated'))
    model = init_detector(str(path), str(student), device='cpu')
    picture = torch.randint(0, 255, (64, 96, 3), dtype=torch.uint8).numpy()
    found = inference_detector(model, picture, test_pipeline=_plain_pipeline(model)).pred_instances
    assert torch.isfinite(found.bboxes).all() and torch.isfinite(found.scores).all()


def _plain_pipeline(model):
    """The config's own pipeline would enlarge the picture to 800 x 1333."""
    from mmcv.transforms import Compose
    from mmdet.utils import get_test_pipeline_cfg

    steps = get_test_pipeline_cfg(model.cfg)
    for step in steps:
        if step.type.endswith('Resize'):
            step.scale = (96, 64)
    steps[0].type = 'mmdet.LoadImageFromNDArray'
    return Compose(steps)


def test_scope_full(detector):
    """Everything behind the backbone is calibrated, and the head learns: dense maps, or queries."""
    path = detector.config(
        quant=dict(preset='w8a8', scope='full'), name='full.py', iters=1, evolve_every=0, distil=('backbone', 'head')
    )
    assert dfq_train([str(path), '--work-dir', str(detector.folder / 'full')]) == 0
    state = read_checkpoint(detector.folder / 'full' / 'student.pth')['state_dict']
    assert {key.split('.')[0] for key in state if is_quantizer_key(key)} == {
        'backbone',
        'neck',
        'bbox_head',
        *BEHIND_THE_NECK.get(detector.name, ()),
    }
    assert all(bool(value) for key, value in state.items() if key.endswith('_quantizer.calibrated'))
    plain = read_checkpoint(detector.checkpoint)['state_dict']
    for part in ('bbox_head', *BEHIND_THE_NECK.get(detector.name, ())):
        learned = [k for k in plain if k.startswith(f'{part}.') and not torch.equal(plain[k], state[k])]
        assert learned or part == 'memory_trans_fc', f'{part} learns'


def built(text, **changes):
    """The full-precision model of a config's text, without memory for its weights."""
    from mmengine.config import Config
    from mmengine.registry import MODELS, init_default_scope

    config = Config.fromstring(text, '.py')
    init_default_scope(config.default_scope)
    config.model.pop('pretrained', None)  # of mmseg's segmentors alone
    for part, value in changes.items():  # update() would merge them into what is there
        config.model[part] = value
    with WeightsWithoutMemory():
        return MODELS.build(config.model)


SWIN_LIKE = dict(type='SwinTransformer', embed_dims=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8], window_size=7)
REFUSED = dict(
    fast_rcnn=('mmdet', 'fast_rcnn/fast-rcnn_r50_fpn_1x_coco', 'cannot run FastRCNN, whose RoI head has no RPN'),
    panoptic_fpn=('mmdet', 'panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco', 'cannot run semantic_head of PanopticFPN'),
    solo=('mmdet', 'solo/solo_r50_fpn_1x_coco', 'cannot run mask_head of SOLO'),
    htc=('mmdet', 'htc/htc_r50_fpn_1x_coco', 'cannot run roi_head.semantic_head of HybridTaskCascade'),
    mask_scoring=(
        'mmdet',
        'ms_rcnn/ms-rcnn_r50-caffe_fpn_1x_coco',
        'cannot run roi_head.mask_iou_head of MaskScoringRCNN',
    ),
    queryinst=('mmdet', 'queryinst/queryinst_r50_fpn_1x_coco', 'cannot run the RoI head SparseRoIHead of QueryInst'),
    pointrend=(
        'mmseg',
        'point_rend/pointrend_r101_4xb4-160k_ade20k-512x512',
        'cannot run decode_head of CascadeEncoderDecoder',
    ),
)


@pytest.mark.parametrize('name', list(REFUSED))
def test_what_the_full_scope_does_not_cover_is_refused_by_name(name):
    """Before anything is run or converted; the backbone alone is quantized all the same."""
    library, path, message = REFUSED[name]
    pytest.importorskip(library)
    model = built(f"_base_ = ['{library}::{path}.py']\n", backbone=dict(SWIN_LIKE))
    with pytest.raises(UnsupportedModelError, match=message):
        quantize_model_(model, dict(preset='w8a8', scope='full'))
    report = quantize_model_(model, 'w8a8')
    assert len(report.layers) > 10 and all(row.name.startswith('backbone.') for row in report.layers)


def test_a_head_that_needs_more_than_levels_is_named():
    from mmengine.model import BaseModule
    from swin_models import build_backbone

    class Head(BaseModule):
        def forward(self, levels, text):
            return levels

    class Detector(BaseModule):
        def __init__(self):
            super().__init__()
            self.backbone, self.bbox_head = build_backbone('mmdet'), Head()

    with pytest.raises(UnsupportedModelError, match=r'bbox_head of Detector \(Head\) needs more than the levels'):
        TaskModel(Detector(), ('head',)).outputs(torch.randn(1, 3, 56, 56))
