"""From a checkpoint of Swin's detectors to one that this project quantizes, on the command line."""

import pytest
import torch
from original_swin import OriginalSwin
from quick_builds import metafiles_read_once
from tiny import CASCADE, DETECTOR, SEGMENTOR, Project

from psaq_mm.commands.convert_checkpoint import main as convert_command
from psaq_mm.engine.checkpoint import load_weights, read_checkpoint

pytestmark = pytest.mark.filterwarnings('ignore')


@pytest.fixture(scope='module', autouse=True)
def quick_configs():
    with metafiles_read_once():
        yield


class Release:
    """A tiny project, and its model's checkpoint as the release of another generation had it.

    The heads' names have not changed since; the backbone has other names and another order of patch merging.
    """

    def __init__(self, folder, base):
        from mmengine.config import Config
        from tiny import build_full_precision

        self.project = Project(folder, base)
        self.config = Config.fromfile(self.project.base)
        self.model = build_full_precision(self.config, seed=1)
        torch.manual_seed(2)
        self.swin = OriginalSwin(16, (2, 2, 1, 1), (1, 2, 4, 8)).eval()
        self.weights = {f'backbone.{name}': value for name, value in self.swin.state_dict().items()}
        heads = {name: value for name, value in self.model.state_dict().items() if not name.startswith('backbone.')}
        self.weights.update(heads)
        self.source = self.save('release.pth')

    def save(self, name, **more):
        path = self.project.folder / name
        meta = dict(CLASSES=('bolt', 'nut'), PALETTE=[(1, 2, 3), (4, 5, 6)], epoch=36)
        torch.save(dict(meta=meta, state_dict={**self.weights, **more}), path)
        return path

    def run(self, source, *arguments, name='converted.pth'):
        out = self.project.folder / name
        return convert_command([str(a) for a in (self.project.base, source, '--out', out, *arguments)]), out


@pytest.fixture(scope='module')
def release(tmp_path_factory):
    pytest.importorskip('mmdet')
    return Release(tmp_path_factory.mktemp('detector'), DETECTOR)


def images_of(size=(64, 96)):
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))


def agrees(release, out):
    """The converted model's maps are those of its heads on the original backbone's features."""
    checkpoint = read_checkpoint(out)
    assert checkpoint['meta']['dataset_meta'] == dict(classes=('bolt', 'nut'), palette=[(1, 2, 3), (4, 5, 6)])
    assert checkpoint['meta']['converted_from']['naming'] == 'original'
    model = release.model
    load_weights(model, checkpoint, out)
    with torch.no_grad():
        stages = release.swin(images_of())
        for ours, theirs in zip(model.backbone(images_of()), stages):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        expected = model.neck(tuple(stages)) if model.with_neck else [model.decode_head(stages)]
        found = (
            model.neck(tuple(model.backbone(images_of())))
            if model.with_neck
            else [model.decode_head(model.backbone(images_of()))]
        )
        for ours, theirs in zip(found, expected):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    for name, value in release.weights.items():
        if not name.startswith('backbone.'):
            assert torch.equal(checkpoint['state_dict'][name], value), name


def test_mask_rcnn_of_swins_release(release, capsys):
    status, out = release.run(release.source)
    assert status == 0
    said = capsys.readouterr().out
    assert 'naming of the checkpoint: original' in said and 'no place' not in said and f'saved to {out}' in said
    agrees(release, out)


def test_cascade_and_segmentor_of_swins_releases(tmp_path):
    pytest.importorskip('mmdet')
    pytest.importorskip('mmseg')
    for name, base in (('cascade', CASCADE), ('segmentor', SEGMENTOR)):
        (tmp_path / name).mkdir()
        found = Release(tmp_path / name, base)
        status, out = found.run(found.source)
        assert status == 0
        agrees(found, out)


def test_a_quantized_config_names_the_same_model(release):
    out = release.project.folder / 'for_quantized.pth'
    config = release.project.config(name='leaf.py')
    assert convert_command([str(config), str(release.source), '--out', str(out)]) == 0
    plain = read_checkpoint(release.run(release.source)[1])['state_dict']
    found = read_checkpoint(out)['state_dict']
    assert set(found) == set(plain) and all(torch.equal(found[key], plain[key]) for key in found)


def test_safetensors(release):
    safetensors = pytest.importorskip('safetensors.torch')
    path = release.project.folder / 'release.safetensors'
    safetensors.save_file({name: value.contiguous() for name, value in release.weights.items()}, path)
    status, out = release.run(path, name='from_safetensors.pth')
    assert status == 0
    plain = read_checkpoint(release.run(release.source)[1])['state_dict']
    assert all(torch.equal(read_checkpoint(out)['state_dict'][key], plain[key]) for key in plain)


def test_the_converted_checkpoint_is_quantized(release):
    from psaq_mm.commands.dfq_train import main as dfq_train

    status, out = release.run(release.source)
    work_dir = release.project.folder / 'work'
    config = release.project.config(name='dfq.py', preset='gaussian', iters=0, evolve_every=0)
    assert dfq_train([str(config), '--checkpoint', str(out), '--work-dir', str(work_dir)]) == 0
    assert read_checkpoint(work_dir / 'student.pth')['meta']['dataset_meta']['classes'] == ('bolt', 'nut')


def test_every_key_without_a_place_is_named_and_nothing_is_written(release, capsys):
    source = release.save('extra.pth', **{'ema.decay': torch.zeros(1), 'mask_iou_head.fc.weight': torch.zeros(2, 3)})
    out = release.project.folder / 'kept.pth'
    out.write_bytes(b'what stood here')
    status, out = release.run(source, name='kept.pth')
    captured = capsys.readouterr()
    assert status == 1 and out.read_bytes() == b'what stood here'
    assert (
        'found no place: ema.decay (1,)' in captured.out
        and 'found no place: mask_iou_head.fc.weight (2, 3)' in captured.out
    )
    assert '2 weights found no place' in captured.err and '--drop' in captured.err
    assert not list(release.project.folder.glob('.*.partial'))
    status, out = release.run(source, '--drop', 'ema.*', 'mask_iou_head.*', name='kept.pth')
    assert status == 0
    agrees(release, out)


def test_backbone_alone(release, capsys):
    status, out = release.run(release.source, '--backbone-only', name='backbone.pth')
    assert status == 0 and 'left out: neck.lateral_convs.0.conv.weight' in capsys.readouterr().out
    assert all(key.startswith('backbone.') for key in read_checkpoint(out)['state_dict'])


@pytest.mark.parametrize(
    'change, words',
    [
        (
            lambda w: {'backbone.layers.0.blocks.0.attn.qkv.weight': torch.zeros(3, 3)},
            ['(3, 3)', '(48, 16)', 'qkv.weight'],
        ),
        (lambda w: {'neck.lateral_convs.0.conv.weight': torch.zeros(1)}, ['(1,)', '(16, 16, 1, 1)', 'lateral_convs']),
    ],
)
def test_shapes_that_do_not_fit(release, capsys, change, words):
    status, out = release.run(release.save('shapes.pth', **change(release.weights)), name='shapes_out.pth')
    error = capsys.readouterr().err
    assert status == 1 and not out.exists()
    for word in words:
        assert word in error


def test_mistakes_on_the_command_line(release, capsys, tmp_path):
    def fails(*arguments):
        assert convert_command([str(a) for a in arguments]) == 1
        return capsys.readouterr().err

    base = release.project.base
    assert '.pth' in fails(base, release.source, '--out', tmp_path / 'x.onnx')
    assert 'there is no checkpoint' in fails(base, tmp_path / 'none.pth', '--out', tmp_path / 'x.pth')
    torch.save(dict(state_dict={'conv1.weight': torch.zeros(1)}), tmp_path / 'resnet.pth')
    assert 'no Swin Transformer' in fails(base, tmp_path / 'resnet.pth', '--out', tmp_path / 'x.pth')
    (tmp_path / 'resnet.py').write_text(
        "_base_ = ['mmdet::_base_/models/mask-rcnn_r50_fpn.py']\ndefault_scope = 'mmdet'\n"
    )
    assert 'has no SwinTransformer' in fails(tmp_path / 'resnet.py', release.source, '--out', tmp_path / 'x.pth')
    (tmp_path / 'nothing.py').write_text('a = 1\n')
    assert 'has no model' in fails(tmp_path / 'nothing.py', release.source, '--out', tmp_path / 'x.pth')
    quantized = dict(release.weights, **{'backbone.x.input_quantizer.scale': torch.ones(1)})
    torch.save(dict(state_dict=quantized), tmp_path / 'quantized.pth')
    assert 'is quantized' in fails(base, tmp_path / 'quantized.pth', '--out', tmp_path / 'x.pth')
    assert not (tmp_path / 'x.pth').exists()
