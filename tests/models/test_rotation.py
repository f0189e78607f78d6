"""Rotating whole models: the same outputs, known streams, and weights that come back where something else reads
them."""

import pytest
import torch
import torch.nn.functional as F
from classifier_models import MODELS, SIZES, build_classifier
from mmengine.config import Config
from tf32 import tf32  # noqa: F401
from tiny import CASCADE, DETECTOR, SEGMENTOR, build_full_precision
from vit_models import CONFIGS, build, images_of, run

from psaq_mm.errors import UnsupportedModelError
from psaq_mm.models import TaskModel, quantize_model_, rotate_model_
from psaq_mm.models.rotation import streams_of
from psaq_mm.psaq_vit import AttentionTaps
from psaq_mm.quantization import quantizers, set_mode

pytestmark = pytest.mark.filterwarnings('ignore')

STAGE_1 = 'the stream of stage 1: it begins behind the LayerNorm of the patch embedding'
TASKS = {
    'detector': (DETECTOR, 'neck'),
    'cascade': (CASCADE, 'neck'),
    'cascade from level 1': (
        CASCADE + "model['neck'].update(start_level=1, add_extra_convs='on_output', num_outs=5)\n",
        'neck',
    ),
    'segmentor': (SEGMENTOR, 'head'),
    'segmentor whose auxiliary head sees its input twice': (
        SEGMENTOR + "model['auxiliary_head'].update(concat_input=True)\n",
        'head',
    ),
}


def changed(before, after):
    return max(float((new - old).abs().max() / old.std()) for old, new in zip(before, after))


def task_model(name):
    text, part = TASKS[name]
    library = 'mmseg' if name.startswith('segmentor') else 'mmdet'
    pytest.importorskip(library)
    return build_full_precision(Config.fromstring(text, '.py')), part


@pytest.mark.parametrize('name', MODELS)
def test_classifiers_with_their_streams(name):
    model = build_classifier(name)
    images = torch.randn(2, 3, *[SIZES[name]] * 2)
    before, weights = run(model, images), {k: p.detach().clone() for k, p in model.named_parameters()}
    report = rotate_model_(model, [SIZES[name]] * 2)
    assert changed(before, run(model, images)) < 1e-5
    swin = 'swin' in name
    assert [part for part, _ in report.streams] == ['the stream of stage 2' if swin else 'the stream']
    assert report.left == ([STAGE_1] if swin else []) and report.heads == (5 if swin else 8)
    still = [k for k, p in model.named_parameters() if torch.equal(p, weights[k])]
    outside = ('layers.0.', 'stages.0.', 'patch_embed', 'relative_position', 'downsample.norm')
    assert all(k.endswith('.bias') or swin and any(part in k for part in outside) for k in still), still


@pytest.mark.parametrize('name', CONFIGS)
def test_backbones_of_every_kind_give_what_they_gave(name):
    model, images = build(name), images_of(name)
    quantize_model_(model, 'w8a8')  # mmseg's attention has its layers from then on
    set_mode(model, 'off')
    before = run(model, images)
    report = rotate_model_(model, tuple(images.shape[-2:]))
    assert changed(before, run(model, images)) < 1e-5
    assert report.heads == (6 if 'swin' in name else 4)
    assert all(quantizer.mode == 'off' for _, quantizer in quantizers(model))


@pytest.mark.parametrize('name', TASKS)
def test_detectors_and_segmentors_up_to_the_convolutions_that_read_their_maps(name):
    model, part = task_model(name)
    size = (75, 110)  # windows and the merging of tokens are padded
    images = torch.randn(2, 3, *size)
    backbone, outputs = TaskModel(model, ('backbone',)), TaskModel(model, (part,))
    with torch.no_grad():
        maps, before = backbone.outputs(images), outputs.outputs(images)
        auxiliary = model.auxiliary_head(tuple(maps)) if part == 'head' else None
    report = rotate_model_(model, size)
    assert [width for _, width in report.streams] == [32, 64, 128] and report.left == [STAGE_1]
    with torch.no_grad():
        turned, after = backbone.outputs(images), outputs.outputs(images)
        assert changed(before, after) < 1e-4
        assert part != 'head' or changed([auxiliary], [model.auxiliary_head(tuple(turned))]) < 1e-4
    assert changed(maps[:1], turned[:1]) < 1e-4 and changed(maps[1:2], turned[1:2]) > 0.1, (
        'maps are rotated but for the first'
    )


@pytest.mark.parametrize(
    'text, reason',
    [
        (DETECTOR + "model['neck'].update(add_extra_convs='on_input', num_outs=6)\n", 'further levels of its inputs'),
        (
            DETECTOR + "model['neck'] = dict(type='ChannelMapper', in_channels=[16, 32, 64, 128], out_channels=16)\n",
            'not known here',
        ),
    ],
)
def test_necks_that_are_not_known_leave_the_streams(text, reason):
    pytest.importorskip('mmdet')
    model = build_full_precision(Config.fromstring(text, '.py'))
    images = torch.randn(1, 3, 64, 96)
    before = run(model.backbone, images)
    report = rotate_model_(model, (64, 96))
    assert report.streams == [] and len(report.left) == 4 and all(reason in line for line in report.left[-1:]), report
    assert report.heads == 2 * 1 + 2 * 2 + 4 + 8 and changed(before, run(model.backbone, images)) < 1e-5


@pytest.mark.parametrize('name', ['timm-vit', 'mmpretrain-swin'])
def test_patch_similarity_is_what_it_was(name):
    model = build_classifier(name)
    images, found = torch.randn(2, 3, *[SIZES[name]] * 2), []
    for rotated in (False, True):
        if rotated:
            rotate_model_(model, [SIZES[name]] * 2)
        with torch.no_grad(), AttentionTaps(model).record(images) as record:
            model(images)
        found.append([tap.tokens for tap in record])
    for plain, turned in zip(*found):
        assert (plain - turned).abs().max() > 0.05 * plain.std()
        torch.testing.assert_close(
            F.normalize(turned, dim=-1) @ F.normalize(turned, dim=-1).mT,
            F.normalize(plain, dim=-1) @ F.normalize(plain, dim=-1).mT,
            rtol=0,
            atol=1e-4,
        )


def test_the_seed_alone_decides():
    found = []
    for seed in (0, 0, 1):
        model = build_classifier('timm-vit')
        torch.manual_seed(len(found))
        rotate_model_(model, (32, 32), seed)
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_a_reader_that_nobody_told_of_brings_the_weights_back():
    model = build_classifier('timm-vit')
    model.model.norm.register_forward_hook(lambda module, inputs, output: output * torch.linspace(0, 1, 32))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UnsupportedModelError, match='TimmClassifier changed its outputs by .* dfq.rotate=False'):
        rotate_model_(model, (32, 32))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_gain_of_zero_leaves_its_stage():
    model, _ = task_model('detector')
    with torch.no_grad():
        model.backbone.stages[1].blocks[0].norm1.weight[2] = 0
    report = rotate_model_(model, (64, 96))
    assert [width for _, width in report.streams] == [64, 128]
    assert report.left[-1].startswith('the stream of stage 2: A LayerNorm has a gain of 0')


def test_backbones_alone_hand_out_the_maps_that_they_did():
    model, _ = task_model('detector')
    assert streams_of(model.backbone, model.backbone)[0] == []


@pytest.mark.parametrize('name', ['detector', 'segmentor'])
@pytest.mark.parametrize('quantized', [False, True])
def test_the_check_is_not_made_in_tf32(name, quantized, tf32):  # noqa: F811
    """On cards that shorten the factors of a convolution, which tells good rotations from wrong ones no more."""
    model, _ = task_model(name)
    if quantized:
        quantize_model_(model, 'w8a8')
        set_mode(model, 'off')
        torch.backends.cudnn.allow_tf32 = True
    assert rotate_model_(model, (64, 96)).streams
    assert not tf32 and torch.backends.cudnn.allow_tf32
