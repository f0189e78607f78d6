"""Checkpoints by URL, and those of timm in today's and in older layouts."""

import concurrent.futures
import functools
import hashlib
import http.server
import threading
import time

import pytest
import torch
from classifier_models import IMAGENET, build_classifier
from safetensors.torch import save_file

from psaq_mm.engine.checkpoint import load_weights, read_checkpoint
from psaq_mm.engine.samples import load_samples
from psaq_mm.errors import CheckpointError
from psaq_mm.models import TaskModel
from psaq_mm.quantization import calibrate, set_mode

pytestmark = pytest.mark.filterwarnings('ignore')


class Site(tuple):
    """Folder and URL, with what was asked for (``asked``) and where downloads go (``cache``)."""

    def __new__(cls, pair, asked, cache):
        self = super().__new__(cls, pair)
        self.asked, self.cache = asked, cache
        return self


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder and the URL under which it is served."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        asked = []

        def log_message(self, *args):
            pass

        def do_GET(self):
            self.asked.append(self.path)
            if 'slow' in self.path:
                time.sleep(0.5)
            if 'cut_short' not in self.path:
                return super().do_GET()
            self.send_response(200)
            self.send_header('Content-Length', '1000')
            self.end_headers()
            self.wfile.write(b'x' * 10)

    folder = tmp_path / 'site'
    folder.mkdir()
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield Site(
        (folder, f'http://127.0.0.1:{server.server_address[1]}'),
        Quiet.asked,
        tmp_path / 'cache' / 'hub' / 'checkpoints',
    )
    server.shutdown()
    server.server_close()


def test_two_models_of_one_file_name_do_not_collide(site):
    folder, url = site
    for name, value in (('one', 1.0), ('two', 2.0)):
        (folder / name).mkdir()
        save_file(dict(weight=torch.full((2,), value)), folder / name / 'model.safetensors')
    for name, value in (('one', 1.0), ('two', 2.0), ('one', 1.0)):
        assert (
            float(read_checkpoint(f'{url}/{name}/model.safetensors?download=true')['state_dict']['weight'][0]) == value
        )
    (folder / 'one' / 'model.safetensors').unlink()
    assert read_checkpoint(f'{url}/one/model.safetensors?download=true')['state_dict']  # from the cache


def publish(folder, stem):
    """A checkpoint under a name that tells its content, as OpenMMLab publishes it."""
    torch.save(dict(state_dict=dict(weight=torch.ones(1))), folder / 'net.pth')
    name = f'{stem}-{hashlib.sha256((folder / "net.pth").read_bytes()).hexdigest()[:8]}.pth'
    (folder / 'net.pth').rename(folder / name)
    return name


def test_a_name_that_tells_its_content_keeps_it_in_the_cache(site, capsys):
    folder, url = site
    name = publish(folder, 'net_20210902')
    read_checkpoint(f'{url}/{name}')
    said = capsys.readouterr()
    assert [path.name for path in site.cache.iterdir()] == [name]
    assert f'downloading {url}/{name}' in said.out and not said.err  # a bar is for a terminal alone
    read_checkpoint(f'{url}/{name}')
    assert len(site.asked) == 1 and not capsys.readouterr().out


def test_content_that_is_not_what_the_name_says_is_refused(site):
    folder, url = site
    (folder / publish(folder, 'net')).rename(folder / 'net_20210902-9d6b7cfa.pth')
    with pytest.raises(
        CheckpointError,
        match='net_20210902-9d6b7cfa.pth is not what its name says, whose SHA-256 begins with 9d6b7cfa '
        '.*try again, or give the local path',
    ):
        read_checkpoint(f'{url}/net_20210902-9d6b7cfa.pth')
    assert not list(site.cache.iterdir())


def test_a_day_at_the_end_of_a_name_is_no_hash(site):
    folder, url = site
    (folder / publish(folder, 'net')).rename(folder / 'net-20210902.pth')
    assert read_checkpoint(f'{url}/net-20210902.pth')['state_dict']


@pytest.mark.parametrize('name', ['nothing.pth', 'cut_short.pth', 'cut_short-9d6b7cfa.pth'])
def test_a_download_that_fails_leaves_nothing(site, name):
    with pytest.raises(CheckpointError, match=f'{name} (could not be downloaded|is not what its name says)'):
        read_checkpoint(f'{site[1]}/{name}')
    assert not list(site.cache.iterdir())


@pytest.mark.parametrize('name', ['{}', 'slow.pth'])
def test_those_who_want_one_file_at_once_download_it_once(site, name):
    """As the ranks of a machine do; the lock is the system's, and does not tell threads from processes."""
    folder, url = site
    published = publish(folder, 'slow_net')
    if name == 'slow.pth':
        (folder / published).rename(folder / name)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: read_checkpoint(f'{url}/{name.format(published)}'), range(4)))
    assert len(found) == 4 and all(torch.equal(one['state_dict']['weight'], torch.ones(1)) for one in found)
    assert len(site.asked) == 1 and len(list(site.cache.iterdir())) == 1


TIMM = ['timm-vit', 'timm-deit-distilled', 'timm-swin']


def timm_weights(name, seed=1):
    return {k: v.clone() for k, v in build_classifier(name, seed).model.state_dict().items()}


@pytest.mark.parametrize('name', TIMM)
def test_timms_own_checkpoint_fits_a_quantized_timm_classifier(name, tmp_path):
    weights = timm_weights(name)
    torch.save(weights, tmp_path / 'timm.pth')
    model = build_classifier(name, quant=dict(preset='w8a8', scope='full'))
    load_weights(model, read_checkpoint(tmp_path / 'timm.pth'), 'timm.pth')
    set_mode(model, 'off')
    images = torch.randn(2, 3, 56, 56) if 'swin' in name else torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(images), build_classifier(name, 1)(images), rtol=1e-4, atol=1e-5)
    set_mode(model, 'on')
    # And the student's own, in both directions.
    task = TaskModel(model)
    calibrate(model, lambda: task.calibration_forward(images, 'full'))
    other = build_classifier(name, seed=2, quant=dict(preset='w8a8', scope='full'))
    other.load_state_dict(model.state_dict())
    load_weights(other, dict(state_dict=model.state_dict()), 'student')
    with torch.no_grad():
        torch.testing.assert_close(other(images), model(images), rtol=0, atol=0)


@pytest.mark.parametrize(
    'change, match',
    [
        (lambda w: w.pop('blocks.1.attn.qkv.weight'), 'lacks 1 weights of the model .*blocks.1.attn.qkv.weight'),
        (lambda w: w.update({'head.weight': torch.zeros(7, 32)}), r'head.weight is \(7, 32\).*\(5, 32\)'),
        (lambda w: w.update(pos_embed=torch.zeros(1, 50, 32)), r'pos_embed is \(1, 50, 32\)'),
        (lambda w: w.update(pos_embed=torch.zeros(1, 50, 32), spare=torch.zeros(1)), r'pos_embed is \(1, 50, 32\)'),
        (
            lambda w: w.update({'blocks.9.norm1.weight': torch.zeros(32)}),
            '1 weights have no place .*blocks.9.norm1.weight',
        ),
        (lambda w: w['norm.weight'].fill_(torch.nan), 'norm.weight holds NaN'),
    ],
)
@pytest.mark.parametrize('quant', [None, 'w8a8'])
def test_what_does_not_fit_a_timm_classifier_is_named_and_changes_nothing(change, match, quant):
    weights = timm_weights('timm-vit')
    change(weights)
    model = build_classifier('timm-vit', quant=quant)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=match) as caught:
        load_weights(model, dict(state_dict=weights), 'wrong.pth')
    assert str(caught.value).startswith('wrong.pth: ')
    assert all(torch.equal(v, before[k]) or not v.isfinite().all() for k, v in model.state_dict().items())
    load_weights(model, dict(state_dict=timm_weights('timm-vit')), 'right.pth')


def test_the_guard_of_a_quantized_timm_classifier_works_for_whoever_loads():
    model = build_classifier('timm-vit', quant='w8a8')
    weights = timm_weights('timm-vit')
    model.load_state_dict(weights, strict=False)
    del weights['norm.bias']
    with pytest.raises(CheckpointError, match='norm.bias'):
        model.load_state_dict(weights, strict=False)


def test_swin_of_old_timm_and_of_its_own_release(tmp_path):
    new = timm_weights('timm-swin')
    old = {
        k.replace('layers.1.downsample', 'layers.0.downsample').replace('head.fc.', 'head.'): v for k, v in new.items()
    }
    assert 'layers.0.downsample.norm.weight' in old and 'head.weight' in old
    old['layers.0.blocks.0.attn.relative_position_index'] = torch.zeros(49, 49, dtype=torch.long)
    old['layers.0.blocks.1.attn_mask'] = torch.zeros(4, 49, 49)
    torch.save(dict(model=old, epoch=299), tmp_path / 'released.pth')
    model = build_classifier('timm-swin', quant=dict(preset='w8a8', scope='full'))
    load_weights(model, read_checkpoint(tmp_path / 'released.pth'), 'released.pth')
    found = model.state_dict()
    assert all(torch.equal(found[k], v) for k, v in new.items())


def test_real_deit_tiny(data_root, tmp_path):
    """timm's released weights in mmpretrain's TimmClassifier: top-1 of the float model on a few photographs, quantized
    agrees."""
    path = data_root / 'deit_tiny_patch16_224.safetensors'
    photographs = sorted((data_root / 'imagenet_1000').glob('*.jpg'))[::50]
    pytest.importorskip('timm')
    from mmengine.registry import MODELS, DefaultScope

    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(
            dict(
                type='psaq_mm.Quantized',
                base_type='TimmClassifier',
                model_name='deit_tiny_patch16_224',
                quant=dict(preset='w8a8', scope='full'),
                data_preprocessor=dict(IMAGENET, to_rgb=True),
            )
        )
    model.eval()
    load_weights(model, read_checkpoint(path), path)
    task = TaskModel(model)
    assert task.prefix_tokens == 1 and task.fixed_size == (224, 224) and task.num_classes == 1000
    folder = tmp_path / 'some'
    folder.mkdir()
    for photograph in photographs:
        (folder / photograph.name).symlink_to(photograph)
    images = load_samples(folder, (224, 224), model, task.image_spec).samples
    classes = torch.tensor([int(p.name.split('_')[0]) for p in photographs])
    set_mode(model, 'off')
    with torch.no_grad():
        floating = task.run(images, with_logits=True).logits.argmax(1)
    assert float((floating == classes).float().mean()) >= 0.6
    set_mode(model, 'on')
    calibrate(model, lambda: task.calibration_forward(images, 'full'))
    with torch.no_grad():
        assert float((model(images).argmax(1) == floating).float().mean()) >= 0.8
