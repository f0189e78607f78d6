"""Checkpoints that other training programs and other releases leave: which weights are taken, what is left out, what is
refused."""

import argparse
import os

import numpy as np
import pytest
import torch
from mmengine.config import Config
from safetensors.torch import save_file
from tiny import SEGMENTOR, Project

from psaq_mm.commands.convert_checkpoint import convert_checkpoint
from psaq_mm.engine.checkpoint import dataset_meta_of, load_weights, read_checkpoint, save_atomic, student_checkpoint
from psaq_mm.engine.config import drop_pretrained, to_data_free
from psaq_mm.errors import CheckpointError, ConfigError

pytestmark = pytest.mark.filterwarnings('ignore')


class Segmentor:
    """A quantized segmentor with an auxiliary head, the weights of its full-precision model, and files of them."""

    def __init__(self, folder):
        self.folder, self.project = folder, Project(folder, SEGMENTOR)
        self.weights = torch.load(self.project.checkpoint)['state_dict']
        self.config = Config.fromfile(self.project.base)
        self.models = {}

    def model(self, auxiliary=True, quant='w8a8'):
        from mmengine.registry import MODELS, init_default_scope

        if (auxiliary, quant) not in self.models:
            init_default_scope('mmseg')
            config = self.config.copy().model
            drop_pretrained(config)
            config = dict(config, type='psaq_mm.Quantized', base_type=config.type, quant=quant) if quant else config
            self.models[auxiliary, quant] = MODELS.build(
                config if auxiliary else dict(config, auxiliary_head=None)
            ).eval()
        return self.models[auxiliary, quant]

    def save(self, content, name='other.pth', **options):
        torch.save(content, self.folder / name, **options)
        return self.folder / name

    def loaded(self, content, **which):
        """The model with what a file holds, after every weight of it was set to something else."""
        model = self.model(**which)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.5)
        path = content if not isinstance(content, dict) else self.save(content)
        load_weights(model, read_checkpoint(path), path)
        return model.state_dict()


@pytest.fixture(scope='module')
def segmentor(tmp_path_factory):
    pytest.importorskip('mmseg')
    return Segmentor(tmp_path_factory.mktemp('segmentor'))


def under(prefix, weights):
    return {prefix + k: v for k, v in weights.items()}


def compiled(weights):
    return {k.replace('backbone.', 'backbone._orig_mod.'): v for k, v in weights.items()}


def assert_loaded(found, weights, but=('auxiliary_head.',)):
    wrong = [k for k, v in weights.items() if not k.startswith(but) and not torch.equal(found[k], v)]
    assert not wrong, wrong[:3]


# ---------------------------------------------------------------------- names
RIGHT = dict(
    bare=lambda w: w,
    with_arguments=lambda w: dict(model=w, args=argparse.Namespace(lr=1e-3)),  # of DeiT, MAE, ConvNeXt
    module=lambda w: dict(state_dict=under('module.', w)),
    compile=lambda w: dict(state_dict=under('_orig_mod.', w)),
    compile_in_ddp=lambda w: dict(state_dict=under('module._orig_mod.', w)),
    ddp_in_compile=lambda w: under('_orig_mod.module.', w),
    compiled_backbone=lambda w: dict(state_dict=compiled(w)),
    lightning=lambda w: {
        'state_dict': under('model.', w),
        'pytorch-lightning_version': '2.1',
        'hyper_parameters': dict(lr=1),
    },
    lightning_with_a_loss=lambda w: dict(state_dict={**under('model.', w), 'criterion.weight': torch.ones(5)}),
    any_prefix=lambda w: dict(state_dict=under('net.segmentor.', w)),
    otx=lambda w: dict(model=dict(state_dict=under('model.', w))),
    model=lambda w: dict(model=w, optimizer=dict(state={}), epoch=3),
    model_state=lambda w: dict(model_state=w),
    deepspeed=lambda w: dict(module=w, optimizer=None, param_shapes=[dict(a=torch.Size([1]))], buffer_names=['b']),
    ema=lambda w: dict(state_dict_ema=w, epoch=3),
    ema_beside=lambda w: dict(state_dict=w, state_dict_ema={k: v * 0 for k, v in w.items()}),
    ema_of_mmengine=lambda w: dict(state_dict=w, ema_state_dict={'steps': torch.tensor(4), **under('module.', w)}),
    averaged_model=lambda w: {'n_averaged': torch.tensor(4), **under('module.', w)},
    ema_of_mmdet_2=lambda w: dict(state_dict={**w, **{'ema_' + k.replace('.', '_'): v * 0 for k, v in w.items()}}),
    ema_of_mmdet_2_in_ddp=lambda w: dict(
        state_dict=under('module.', {**w, **{'ema_' + k.replace('.', '_'): v for k, v in w.items()}})
    ),
    semi_supervised=lambda w: dict(
        state_dict={**under('teacher.', w), **under('student.', {k: v * 0 for k, v in w.items()})}
    ),
    semi_supervised_by_the_student=lambda w: dict(
        meta=dict(cfg="model = dict(semi_test_cfg=dict(predict_on='student'))"),
        state_dict={**under('student.', w), **under('teacher.', {k: v * 0 for k, v in w.items()})},
    ),
    numbers_beside=lambda w: {**w, 'epoch': 3, 'arch': 'swin'},
    arrays=lambda w: dict(model={k: v.numpy() for k, v in w.items()}, extra=torch.zeros(1)),
)


@pytest.mark.parametrize('kind', RIGHT)
def test_weights_are_found_under_the_names_that_training_programs_give_them(segmentor, kind, capsys):
    if kind == 'arrays':
        content = dict(state_dict={**RIGHT[kind](segmentor.weights)['model'], 'spare': torch.zeros(1)})
        # an array is a weight like any other, and so is what has no place
        with pytest.raises(CheckpointError, match='spare'):
            segmentor.loaded(content)
        return
    assert_loaded(segmentor.loaded(RIGHT[kind](segmentor.weights)), segmentor.weights, but=())


@pytest.mark.parametrize(
    'content, match',
    [
        (lambda w: {**w, 'ema_of_mine': torch.zeros(1)}, '1 weights have no place in the model .ema_of_mine'),
        (
            lambda w: {**w, 'ema_backbone_norm3_weight': torch.zeros(1)},
            '1 weights have no place .*ema_backbone_norm3_weight',
        ),
        (lambda w: {**w, 'criterion.weight': torch.zeros(1)}, '1 weights have no place .*criterion.weight'),
        (
            lambda w: {**under('one.', w), **under('two.', w)},
            r'holds the model 2 times \(one., two.\): save one of them alone',
        ),
        (
            lambda w: {k: v for k, v in w.items() if k.startswith('backbone.')},
            'lacks .* weights .*it holds a backbone alone',
        ),
        (
            lambda w: under('model.', {k: v for k, v in w.items() if k.startswith('backbone.')}),
            'it holds a backbone alone',
        ),
        (
            lambda w: {k: v for k, v in w.items() if k != 'auxiliary_head.conv_seg.bias'},
            'lacks 1 weights .*auxiliary_head.conv_seg.bias',
        ),
        (
            lambda w: dict(optimizer=dict(state={0: dict(exp_avg=torch.zeros(1))}), epoch=3),
            r'holds no weights \(its keys are optimizer, epoch',
        ),
        (lambda w: dict(teacher=w, student=w), r'holds no weights \(its keys are teacher, student'),
        (lambda w: dict(state_dict={}, meta={}), 'holds no weights'),
        (
            lambda w: {**w, 'decode_head.conv_seg.bias': w['decode_head.conv_seg.bias'].to_sparse()},
            'decode_head.conv_seg.bias is sparse',
        ),
        (
            lambda w: {**w, 'decode_head.conv_seg.bias': w['decode_head.conv_seg.bias'].to('meta')},
            'decode_head.conv_seg.bias has no values',
        ),
        (
            lambda w: {**w, 'decode_head.conv_seg.weight': w['decode_head.conv_seg.weight'] * torch.nan},
            'decode_head.conv_seg.weight holds NaN',
        ),
    ],
)
def test_what_could_matter_is_refused_as_ever(segmentor, content, match):
    with pytest.raises(CheckpointError, match=match):
        segmentor.loaded(content(segmentor.weights))


def test_each_kind_that_is_left_out_is_one_line_with_its_number_and_an_example(segmentor, caplog):
    weights = segmentor.weights
    double = {'ema_' + k.replace('.', '_'): v for k, v in weights.items()}
    from mmengine.logging import MMLogger

    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    try:
        segmentor.loaded(
            dict(state_dict=under('model.', {**weights, **double}) | {'criterion.weight': torch.ones(5)}),
            auxiliary=False,
        )
    finally:
        logger.removeHandler(caplog.handler)
    said = [r.getMessage() for r in caplog.records if 'left out' in r.getMessage()]
    heads = [k for k in weights if k.startswith('auxiliary_head.')]
    assert len(said) == 3 and all('other.pth: ' in line for line in said)
    assert "1 weights are left out, such as criterion.weight: the model is what lies under 'model'" in said[0]
    assert f'{len(double)} weights are left out, such as ema_' in said[1]
    assert f'{len(heads)} weights are left out, such as {heads[0]}: the config has no auxiliary_head' in said[2]


def test_an_auxiliary_head_on_one_side_only(segmentor, tmp_path):
    weights = segmentor.weights
    without = {k: v for k, v in weights.items() if not k.startswith('auxiliary_head.')}
    assert without != weights
    for which in (dict(auxiliary=False), dict(auxiliary=False, quant=None)):
        assert_loaded(segmentor.loaded(weights, **which), without)
    for which in (dict(), dict(quant=None)):
        found = segmentor.loaded(without, **which)
        assert_loaded(found, without)
        assert bool((found['auxiliary_head.conv_seg.weight'] == 0.5).all())
    segmentor.model().load_state_dict(without, strict=False)  # the libraries' own tools
    with pytest.raises(CheckpointError, match='decode_head.conv_seg.bias'):
        segmentor.model().load_state_dict(
            {k: v for k, v in without.items() if k != 'decode_head.conv_seg.bias'}, strict=False
        )


def test_the_converter_takes_the_same_files(segmentor):
    for kind in ('lightning', 'compile_in_ddp', 'ema_of_mmdet_2', 'semi_supervised', 'otx', 'ema'):
        path = segmentor.save(RIGHT[kind](segmentor.weights))
        found, _, conversion = convert_checkpoint(segmentor.config, str(path))
        conversion.check()
        assert_loaded(found['state_dict'], segmentor.weights, but=())
    config = segmentor.config.copy()
    config.model.auxiliary_head = None
    found, _, conversion = convert_checkpoint(config, str(segmentor.save(segmentor.weights)))
    assert conversion.check().left_out and not any('auxiliary' in k for k in found['state_dict'])
    without = {k: v for k, v in segmentor.weights.items() if not k.startswith('auxiliary_head.')}
    found, _, conversion = convert_checkpoint(segmentor.config, str(segmentor.save(without)))
    assert all(k.startswith('auxiliary_head.') for k in conversion.check().untrained)
    assert_loaded(segmentor.loaded(found), without)


# ---------------------------------------------------------------------- classes and palette
@pytest.mark.parametrize(
    'meta',
    [
        dict(CLASSES=('bolt', 'nut'), PALETTE=[[1, 2, 3], [4, 5, 6]]),
        dict(
            CLASSES=np.array(['bolt', 'nut']),
            PALETTE=np.array([[1, 2, 3], [4, 5, 6]], dtype=np.uint8),
            epoch=np.int64(3),
        ),
        dict(dataset_meta=dict(CLASSES=('bolt', 'nut'), PALETTE=np.array([[1, 2, 3], [4, 5, 6]]))),
        dict(
            dataset_meta=dict(
                classes=['bolt', 'nut'],
                palette=np.array([[1, 2, 3], [4, 5, 6]]),
                label_map={np.int64(0): np.float32(1.5)},
            )
        ),
        dict(dataset_meta=dict(classes=['bolt', 'nut'], palette=[tuple(np.uint8([1, 2, 3])), torch.tensor([4, 5, 6])])),
    ],
)
def test_classes_and_palette_arrive_in_the_student_in_plain_types(segmentor, tmp_path, meta):
    checkpoint = read_checkpoint(segmentor.save(dict(meta=meta, state_dict=segmentor.weights)))
    save_atomic(
        student_checkpoint(segmentor.model(), '', checkpoint['meta']['dataset_meta'], ('fp.pth', ''), {}),
        tmp_path / 'student.pth',
    )
    student = torch.load(tmp_path / 'student.pth', weights_only=True)['meta']['dataset_meta']
    assert list(student['classes']) == ['bolt', 'nut'] and [list(c) for c in student['palette']] == [
        [1, 2, 3],
        [4, 5, 6],
    ]
    assert {type(v) for colour in student['palette'] for v in colour} == {int} and {
        type(v) for v in student['classes']
    } == {str}
    assert dataset_meta_of(checkpoint['meta']) == student


def test_numpy_in_the_meta_that_a_caller_gives(segmentor, tmp_path):
    given = dict(classes=('bolt',), palette=np.array([[1, 2, 3]]))
    save_atomic(student_checkpoint(segmentor.model(), '', given, ('fp.pth', ''), {}), tmp_path / 'student.pth')
    assert torch.load(tmp_path / 'student.pth', weights_only=True)['meta']['dataset_meta']['palette'] == [[1, 2, 3]]


# ---------------------------------------------------------------------- files
def test_formats_of_files(segmentor, tmp_path):
    weights = segmentor.weights
    assert_loaded(
        segmentor.loaded(segmentor.save(dict(state_dict=weights), 'old.pth.tar', _use_new_zipfile_serialization=False)),
        weights,
    )
    save_file({f'module.{k}': v.contiguous() for k, v in weights.items()}, tmp_path / 'ein Modell für alle.safetensors')
    assert_loaded(segmentor.loaded(tmp_path / 'ein Modell für alle.safetensors'), weights)
    os.symlink(segmentor.project.checkpoint, tmp_path / 'link.pth')
    assert_loaded(segmentor.loaded(tmp_path / 'link.pth'), weights)
    half = {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}
    found = segmentor.loaded(dict(state_dict=half))
    assert found['decode_head.conv_seg.weight'].dtype == torch.float32
    assert_loaded({k: v.half() if k in half and half[k].dtype == torch.float16 else v for k, v in found.items()}, half)


def test_a_folder_and_a_link_to_nothing(segmentor, tmp_path):
    (tmp_path / 'link.pth').symlink_to(tmp_path / 'nothing')
    config = Config.fromfile(segmentor.project.config())
    for path, match in (
        (tmp_path, 'is a folder .*: give the file in it'),
        (tmp_path / 'link.pth', 'there is no checkpoint'),
    ):
        with pytest.raises(CheckpointError, match=match):
            read_checkpoint(path)
        with pytest.raises(
            ConfigError, match=match.replace(' .*:', '.*:').replace('there is no checkpoint', 'does not exist')
        ):
            to_data_free(config, checkpoint=str(path))


def test_dead_output_rows_and_gains(segmentor):
    weights = {k: v.clone() for k, v in segmentor.weights.items()}
    weights['backbone.stages.0.blocks.0.ffn.layers.0.0.weight'][3] = 0
    weights['backbone.stages.0.blocks.0.norm1.weight'][:2] = 0
    assert_loaded(segmentor.loaded(weights), weights)
