"""RepQ-ViT and PSAQ-ViT V1 on Mask R-CNN, Cascade Mask R-CNN and UperNet, and RepQ-ViT on a ViT: from config to
metrics."""

import functools
import json
import math
import shutil

import numpy as np
import pytest
import torch
from classifier_models import CLASSIFIER
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from PIL import Image
from tiny import CASCADE, DETECTOR, SEGMENTOR, Project

from psaq_mm.commands.common import load_config
from psaq_mm.commands.dfq_train import main as dfq_train
from psaq_mm.commands.test import main as evaluate_command
from psaq_mm.engine.checkpoint import load_weights, read_checkpoint
from psaq_mm.engine.config import full_precision_model_config
from psaq_mm.engine.hooks.data_free_quant_hook import checkpoints_in
from psaq_mm.engine.samples import build_source
from psaq_mm.models import TaskModel
from psaq_mm.quantization import ReparameterizedQuantizer, is_quantizer_key, quantizers, set_mode

pytestmark = pytest.mark.filterwarnings('ignore')

COCO_DATA = """
train_pipeline = [
    dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='Resize', scale=(96, 64), keep_ratio=True), dict(type='RandomFlip', prob=0.5), dict(type='PackDetInputs')]
test_pipeline = [
    dict(type='LoadImageFromFile'), dict(type='Resize', scale=(96, 64), keep_ratio=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))]
train_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(
    data_root={data!r}, ann_file='train.json', data_prefix=dict(img='train/'), pipeline=train_pipeline))
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(
    data_root={data!r}, ann_file='val.json', data_prefix=dict(img='val/'), pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file={data!r} + '/val.json')
test_evaluator = val_evaluator
"""

SEGMENTATION_DATA = """
train_pipeline = [
    dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=(96, 64), ratio_range=(1., 1.5), keep_ratio=True),
    dict(type='RandomCrop', crop_size=(64, 96), cat_max_ratio=0.75), dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'), dict(type='PackSegInputs')]
test_pipeline = [
    dict(type='LoadImageFromFile'), dict(type='Resize', scale=(96, 64), keep_ratio=True), dict(type='LoadAnnotations'),
    dict(type='PackSegInputs')]
_set = dict(type='BaseSegDataset', data_root={data!r}, img_suffix='.png', metainfo=dict(
    classes=('sky', 'road', 'tree', 'car', 'wall'), palette=[[i, i, i] for i in range(5)]))
train_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(
    data_prefix=dict(img_path='train', seg_map_path='train_maps'), pipeline=train_pipeline, **_set))
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(
    data_prefix=dict(img_path='val', seg_map_path='val_maps'), pipeline=test_pipeline, **_set))
test_dataloader = val_dataloader
"""

TASKS = dict(
    mask_rcnn=('mmdet', DETECTOR + COCO_DATA),
    cascade=('mmdet', CASCADE + COCO_DATA),
    upernet=('mmseg', SEGMENTOR + SEGMENTATION_DATA),
)

# Boxes of random weights have low scores; without a threshold there is something to evaluate, and few of them are
# enough.
FEW_BOXES = [
    'model.test_cfg.rcnn.score_thr=0.0',
    'model.test_cfg.rcnn.max_per_img=5',
    'model.test_cfg.rpn.max_per_img=20',
]
PADDED = (60, 92)
"""Height and width in pixels: 15 x 23 tokens, of which windows of 7 are padded on both sides in every stage."""
REPQ = ['--method', 'repq', '--quant', 'w4a4']


def blocks_and_noise(random, height, width):
    """A picture, (height, width, 3) uint8."""
    coarse = (
        random.integers(0, 256, (-(-height // 12), -(-width // 12), 3)).repeat(12, 0).repeat(12, 1)[:height, :width]
    )
    return np.clip(coarse + random.normal(0, 15, coarse.shape), 0, 255).astype(np.uint8)


def write_coco(folder, part, seed):
    """Two pictures, one wide and one tall, with two boxes each."""
    from mmdet.datasets import CocoDataset

    random, images, annotations = np.random.default_rng(seed), [], []
    (folder / part).mkdir(parents=True)
    for number, (height, width) in enumerate([(64, 96), (96, 72)]):
        Image.fromarray(blocks_and_noise(random, height, width)).save(folder / part / f'{number}.png')
        images.append(dict(id=number, file_name=f'{number}.png', height=height, width=width))
        for x, y, w, h in ((4, 6, 40, 36), (20, 10, 50, 48)):
            number_so_far = len(annotations)
            annotations.append(
                dict(
                    id=number_so_far + 1,
                    image_id=number,
                    category_id=number_so_far % 3 + 1,
                    bbox=[x, y, w, h],
                    area=w * h,
                    iscrowd=0,
                    segmentation=[[x, y, x + w, y, x + w, y + h, x, y + h]],
                )
            )
    categories = [dict(id=i, name=name) for i, name in enumerate(CocoDataset.METAINFO['classes'], 1)]
    (folder / f'{part}.json').write_text(
        json.dumps(dict(images=images, annotations=annotations, categories=categories))
    )


def write_maps(folder, part, seed):
    """Two pictures with a map of five classes each."""
    random = np.random.default_rng(seed)
    for name in (part, f'{part}_maps'):
        (folder / name).mkdir(parents=True)
    for number in range(2):
        Image.fromarray(blocks_and_noise(random, 64, 96)).save(folder / part / f'{number}.png')
        classes = random.integers(0, 5, (8, 12), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(classes).save(folder / f'{part}_maps' / f'{number}.png')


class TaskProject(Project):
    """A project whose config has pictures to train and to test on; those to test on are only written by
    :meth:`write_test`."""

    def __init__(self, folder, task):
        self.task, (library, base) = task, TASKS[task]
        pytest.importorskip(library)
        self.data = folder / 'data'
        self.write = write_maps if task == 'upernet' else write_coco
        self.write(self.data, 'train', 1)
        self.few = [] if task == 'upernet' else FEW_BOXES
        super().__init__(folder, base.replace('{data!r}', repr(str(self.data))))

    def write_test(self):
        self.remove_test()
        self.write(self.data, 'val', 2)

    def remove_test(self):
        for path in self.data.glob('val*'):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def quantized(self, scope, name, **dfq):
        """A config in ``scope`` whose run leaves what :func:`probe` saw in :data:`PROBED`."""
        path = self.config(quant=dict(preset='w4a8', scope=scope), name=f'{name}.py', **dfq)
        path.write_text(path.read_text() + "custom_hooks = [dict(type='ProbeHook')]\n")
        return path

    def train(self, path, name, arguments, options):
        work_dir = self.folder / name
        status = dfq_train([str(path), '--work-dir', str(work_dir), *arguments, '--cfg-options', *options])
        return status, work_dir

    def full_precision(self, path):
        from mmengine.registry import MODELS, init_default_scope

        config = load_config(str(path))
        init_default_scope(config.default_scope)
        model = MODELS.build(full_precision_model_config(config.model))
        model.eval()
        model.load_state_dict(read_checkpoint(self.checkpoint)['state_dict'])
        return model

    def student(self, path, work_dir, quant='w4a4', method='repq'):
        """A model built anew from the config, with the weights of ``student.pth``."""
        from mmengine.registry import MODELS, init_default_scope

        config = load_config(str(path), None, quant, method)
        init_default_scope(config.default_scope)
        model = MODELS.build(config.model)
        model.eval()
        load_weights(model, read_checkpoint(work_dir / 'student.pth'), 'student.pth')
        return model


@torch.no_grad()
def probe(model):
    """What every part of a model gives for noise of :data:`PADDED`, the RoI heads for two fixed boxes: a list of
    tensors."""
    task = TaskModel(model, ('backbone', 'neck', 'head'))
    images = torch.randn(2, 3, *PADDED, generator=torch.Generator().manual_seed(7))
    found, head = task.outputs(images), getattr(model, 'roi_head', None)
    if head is not None:
        levels = tuple(task.features(images)[1])
        rois = torch.tensor([[0.0, 4.0, 4.0, 50.0, 40.0], [1.0, 10.0, 8.0, 80.0, 56.0]])
        for stage in [(i,) for i in range(head.num_stages)] if hasattr(head, 'num_stages') else [()]:
            boxes = head._bbox_forward(*stage, levels, rois)
            found = found + [
                boxes['cls_score'],
                boxes['bbox_pred'],
                head._mask_forward(*stage, levels, rois)['mask_preds'],
            ]
    return found


PROBED = {}


@HOOKS.register_module(force=True)
class ProbeHook(Hook):
    """Keeps what the student gives at the end of its run, before anything is saved and loaded."""

    def after_train(self, runner):
        PROBED[runner.work_dir] = probe(runner.model)


def evaluated(path, work_dir, arguments, options):
    """Metrics that ``tools/test.py`` writes for ``student.pth``."""
    status = evaluate_command(
        [
            str(path),
            str(work_dir / 'student.pth'),
            '--work-dir',
            str(work_dir),
            *arguments,
            '--cfg-options',
            'test_dataloader.num_workers=0',
            *options,
        ]
    )
    assert status == 0
    return json.loads((work_dir / 'test_results.json').read_text())


def log_of(work_dir):
    return next(work_dir.glob('*/*.log')).read_text()


def closest(ours, theirs, tolerance):
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs):
        assert (a - b).abs().max() <= tolerance * b.abs().max(), tuple(b.shape)


@pytest.fixture(scope='module')
def projects(tmp_path_factory):
    """Task to its project, made once."""
    return functools.lru_cache(None)(lambda task: TaskProject(tmp_path_factory.mktemp(task), task))


@pytest.fixture(
    scope='module', params=[(task, scope) for task in TASKS for scope in ('backbone', 'full')], ids='-'.join
)
def repq(request, projects):
    """RepQ-ViT on two training pictures, while there is no test picture: (project, config, work dir, scope)."""
    task, scope = request.param
    project = projects(task)
    project.remove_test()
    path = project.quantized(scope, f'repq_{scope}')
    status, work_dir = project.train(path, f'repq_{scope}', REPQ, ['dfq.calibration_samples=2'])
    assert status == 0
    return project, path, work_dir, scope


# ---------------------------------------------------------------------- RepQ-ViT
def test_repq_on_training_pictures_ends_in_metrics(repq):
    project, path, work_dir, _ = repq
    assert '(real)' in log_of(work_dir)
    project.write_test()
    metrics = evaluated(path, work_dir, REPQ, project.few)['quantized']
    wanted = {'mIoU', 'aAcc', 'mAcc'} if project.task == 'upernet' else {'coco/bbox_mAP', 'coco/segm_mAP'}
    assert wanted <= set(metrics) and all(math.isfinite(value) for value in metrics.values())
    assert all(0 <= metrics[key] <= 100 for key in wanted)


def test_repq_folds_without_changing_the_float_model(repq):
    project, path, work_dir, _ = repq
    model = project.student(path, work_dir)
    reference = probe(project.full_precision(path))
    assert any((a - b).abs().max() > 1e-2 * b.abs().max() for a, b in zip(probe(model), reference)), (
        'nothing is quantized'
    )
    set_mode(model, 'off')
    closest(probe(model), reference, 1e-3)
    for _, quantizer in quantizers(model):
        if isinstance(quantizer, ReparameterizedQuantizer):
            quantizer.fill.zero_()
    assert any((a - b).abs().max() > 1e-3 * b.abs().max() for a, b in zip(probe(model), reference)), (
        'the size pads no window'
    )


def test_repq_student_carries_its_folding_and_loads_again(repq):
    project, path, work_dir, scope = repq
    state = read_checkpoint(work_dir / 'student.pth')['state_dict']
    blocks, merging = 6, 3
    for name in ('folded_bias', 'fill'):
        kept = {k: v for k, v in state.items() if k.endswith(f'.input_quantizer.{name}')}
        assert len(kept) == 2 * blocks + merging and all(bool(v.any()) for v in kept.values()), name
    assert all(bool(v) for k, v in state.items() if k.endswith('_quantizer.calibrated'))
    parts = {k.split('.')[0] for k in state if is_quantizer_key(k)}
    heads = {'decode_head'} if project.task == 'upernet' else {'neck', 'rpn_head', 'roi_head'}
    assert parts == ({'backbone'} | heads if scope == 'full' else {'backbone'})
    for ours, theirs in zip(probe(project.student(path, work_dir)), PROBED[str(work_dir)]):
        assert torch.equal(ours, theirs)


def validation_as_training(task):
    if task == 'upernet':
        return [
            'train_dataloader.dataset.data_prefix.img_path=val',
            'train_dataloader.dataset.data_prefix.seg_map_path=val_maps',
        ]
    return ['train_dataloader.dataset.ann_file=val.json', 'train_dataloader.dataset.data_prefix.img=val/']


@pytest.mark.parametrize('task', ['mask_rcnn', 'upernet'])
def test_validation_pictures_are_refused(projects, task, capsys):
    project = projects(task)
    project.write_test()
    path = project.quantized('backbone', 'refused')
    status, work_dir = project.train(path, 'refused', REPQ, validation_as_training(task))
    error = capsys.readouterr().err.splitlines()[-1]
    assert status == 1 and error.startswith('psaq-dfq-train: ') and str(project.data / 'val') in error
    assert 'the set that is evaluated' in error
    assert not work_dir.exists(), 'nothing is begun'


def missing_data(project):
    return [
        f'{loader}.dataset.data_root={project.folder / "missing"}'
        for loader in ('train_dataloader', 'val_dataloader', 'test_dataloader')
    ]


CHEAP = ['dfq.generator.steps=1', 'dfq.generator.batch_size=1', 'dfq.calibration_samples=1']


@pytest.mark.parametrize('task', ['cascade', 'upernet'])
def test_repq_on_generated_samples_opens_no_dataset(projects, task):
    project = projects(task)
    path = project.quantized('full', 'generated')
    status, work_dir = project.train(path, 'generated', REPQ, ['dfq.source=generated', *CHEAP, *missing_data(project)])
    assert status == 0 and '(generated)' in log_of(work_dir)
    model = project.student(path, work_dir)
    set_mode(model, 'off')
    closest(probe(model), probe(project.full_precision(path)), 1e-3)


@pytest.mark.parametrize('task', ['mask_rcnn', 'upernet'])
def test_real_pictures_that_are_not_there_do_not_go_unnoticed(projects, task, capsys):
    project = projects(task)
    path = project.quantized('backbone', 'nothing')
    assert project.train(path, 'nothing', REPQ, missing_data(project))[0] == 1
    assert 'the training set cannot be opened' in capsys.readouterr().err


# ---------------------------------------------------------------------- PSAQ-ViT V1
@pytest.mark.parametrize('task, scope', [('mask_rcnn', 'backbone'), ('cascade', 'full'), ('upernet', 'full')])
def test_psaq_v1_runs_class_free_and_calibrates_every_edge(projects, task, scope):
    project = projects(task)
    path = project.quantized(scope, f'v1_{scope}')
    options = ['dfq.generator.rounds=1', 'dfq.generator.jitter=3', *CHEAP, *missing_data(project)]
    status, work_dir = project.train(path, f'v1_{scope}', ['--method', 'psaq_v1', '--quant', 'w8a8'], options)
    assert status == 0
    log = log_of(work_dir)
    assert 'is no classifier: samples are made class-free' in log and 'class:' not in log
    state = read_checkpoint(work_dir / 'student.pth')['state_dict']
    edges = {
        k[: -len('_quantizer.calibrated')]: bool(v) for k, v in state.items() if k.endswith('_quantizer.calibrated')
    }
    assert all(edges.values())
    attention = 'backbone.stages.1.blocks.1.attn.w_msa'
    wanted = {
        'backbone.drop_after_pos.output',
        'backbone.stages.1.blocks.1.residual1',
        'backbone.stages.1.blocks.1.residual2',
        f'{attention}.scores',
        f'{attention}.qkv.output',
        f'{attention}.matmul_qk.output',
        f'{attention}.proj.output',
    }
    if scope == 'full':
        wanted |= (
            {'decode_head.conv_seg.output'}
            if task == 'upernet'
            else {
                'rpn_head.rpn_cls.output',
                *(
                    f'roi_head.{head}.{i}.{layer}.output'
                    for i in range(3)
                    for head, layer in (('bbox_head', 'fc_reg'), ('mask_head', 'conv_logits'))
                ),
            }
        )
    assert wanted <= set(edges)
    for ours, theirs in zip(probe(project.student(path, work_dir, 'w8a8', 'psaq_v1')), PROBED[str(work_dir)]):
        assert torch.isfinite(ours).all() and torch.equal(ours, theirs)


# ---------------------------------------------------------------------- training from RepQ-ViT's quantizer
def test_repq_v2_trains_and_resumes(projects):
    project = projects('upernet')
    path = project.quantized(
        'full',
        'v2',
        iters=2,
        evolve_every=1,
        checkpoint_interval=1,
        calibration_samples=1,
        evolve_samples=1,
        batch_size=1,
        generator=dict(batch_size=1, steps=1),
    )
    arguments, options = ['--method', 'repq_v2', '--quant', 'w4a4'], missing_data(project)
    status, work_dir = project.train(path, 'v2', arguments, options)
    assert status == 0 and [p.name for p in checkpoints_in(work_dir)] == ['iter_1.pth', 'iter_2.pth']
    calibrated = project.train(path, 'v2_calibrated', arguments, [*options, 'dfq.iters=0'])[1]
    resumed = project.folder / 'v2_resumed'
    resumed.mkdir()
    shutil.copy(work_dir / 'iter_1.pth', resumed)
    assert project.train(path, 'v2_resumed', [*arguments, '--resume'], options)[0] == 0
    trained, start, again = (read_checkpoint(w / 'student.pth')['state_dict'] for w in (work_dir, calibrated, resumed))
    moved = {k for k in trained if not torch.equal(trained[k], start[k])}
    assert any(k.endswith('qkv.weight') for k in moved) and any(k.endswith('norm1.weight') for k in moved)
    assert not any(is_quantizer_key(k) for k in moved), 'ranges are not observed again'
    assert set(again) == set(trained)
    for key in trained:
        assert torch.equal(again[key], trained[key]), key


# ---------------------------------------------------------------------- the pictures themselves
def still(config):
    """The training pipeline without what is random in it."""
    pipeline = config.train_dataloader.dataset.pipeline
    kept = [
        step
        for step in pipeline
        if step.type not in ('RandomFlip', 'PhotoMetricDistortion', 'RandomResize', 'RandomCrop')
    ]
    config.train_dataloader.dataset.pipeline = kept
    return config


@pytest.mark.parametrize('task', ['mask_rcnn', 'upernet'])
def test_training_pictures_are_normalized_and_padded_as_the_model_takes_them(projects, task):
    from mmengine.registry import init_default_scope

    project = projects(task)
    path = project.quantized('backbone', 'pictures')
    config = still(load_config(str(path)))
    init_default_scope(config.default_scope)
    model = project.full_precision(path)
    made = build_source('real', model, config).draw(range(4), (64, 96), TaskModel(model).image_spec)
    assert made.shape == (4, 3, 64, 96) and torch.equal(made[:2], made[2:]), 'it goes on from the start'
    mean, std = (
        torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1),
        torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1),
    )
    wide = torch.from_numpy(np.array(Image.open(project.data / 'train' / '0.png'))).permute(2, 0, 1)
    expected = (wide - mean) / std  # 64 x 96 already: no pipeline scales it
    assert min(float((image - expected).abs().max()) for image in made[:2]) < 1e-5
    if project.task != 'upernet':
        tall = next(image for image in made[:2] if (image - expected).abs().max() > 1)
        assert not tall[:, :, 64:].any() and bool(tall[:, :, :64].any(1).any(0).all()), (
            'scaled to 85 x 64, cropped, padded'
        )


# ---------------------------------------------------------------------- a classifier
PHOTOGRAPHS = """
data_preprocessor = dict(num_classes=5)
train_dataloader = dict(dataset=dict(_delete_=True, type='CustomDataset', data_root={train!r}, pipeline=[
    dict(type='LoadImageFromFile'), dict(type='RandomResizedCrop', scale=32), dict(type='PackInputs')]))
test_dataloader = dict(persistent_workers=False, dataset=dict(
    _delete_=True, type='CustomDataset', data_root={test!r}, pipeline=_base_.test_pipeline))
"""


def test_repq_on_a_vit_classifier_ends_in_top_1(tmp_path):
    pytest.importorskip('mmpretrain')
    for part, seed in (('train', 1), ('test', 2)):
        random = np.random.default_rng(seed)
        for name in 'abcde':
            (tmp_path / part / name).mkdir(parents=True)
            Image.fromarray(blocks_and_noise(random, 40, 48)).save(tmp_path / part / name / '0.png')
    project = Project(tmp_path, CLASSIFIER)
    path = project.config(quant=dict(preset='w4a8', scope='full'), size=None)
    path.write_text(path.read_text() + PHOTOGRAPHS.format(train=str(tmp_path / 'train'), test=str(tmp_path / 'test')))
    work_dir = tmp_path / 'work'
    assert dfq_train([str(path), '--work-dir', str(work_dir), *REPQ, '--cfg-options', 'dfq.calibration_samples=3']) == 0
    results = evaluated(path, work_dir, [*REPQ, '--full-precision'], [])
    for kind in ('full_precision', 'quantized'):
        assert 0 <= results[kind]['accuracy/top1'] <= 100 and results[kind]['accuracy/top5'] == 100
