"""The page of samples: its numbers are those of the functions it calls, and real images are on it as a curve alone."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from classifier_models import IMAGENET, build_classifier
from PIL import Image
from tiny_classifier import ClassifierProject

from benchmarks import sample_page
from psaq_mm.commands.common import load_config
from psaq_mm.engine.samples import save_samples
from psaq_mm.models import TaskModel
from psaq_mm.pictures import GaussianNoise, ImageSpec, PinkNoise
from psaq_mm.quantization import set_mode
from psaq_mm.visualization import similarity_densities

pytestmark = pytest.mark.filterwarnings('ignore')
SPEC = ImageSpec(**IMAGENET)


@pytest.fixture(scope='module')
def project(tmp_path_factory):
    pytest.importorskip('mmpretrain')
    return ClassifierProject(tmp_path_factory.mktemp('page'), per_class=2)


@pytest.fixture(scope='module')
def labelled(project):
    """Six samples with labels; most are of class 2, then 0."""
    labels = torch.tensor([1, 2, 0, 2, 0, 2])
    return save_samples(project.folder / 'v1', PinkNoise()(6, (32, 32), SPEC), None, SPEC, labels=labels)


@pytest.fixture(scope='module')
def config(project):
    return project.config(name='page.py', size=(32, 32))


@pytest.fixture(scope='module')
def made(project, config, labelled):
    """A page with labelled samples, a folder of pictures, noise and real images."""
    out = project.folder / 'out'
    status = sample_page.main(
        [
            str(config),
            '--samples',
            f'V1 <a>={labelled}',
            f'folder={project.folder / "v1" / "samples"}',
            '--real',
            '4',
            '--rows',
            '2',
            '--out',
            str(out),
        ]
    )
    assert status == 0
    return out


def pictures(page):
    return [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(found))))
        for found in re.findall(r'src="data:image/\w+;base64,([^"]+)"', page)
    ]


def test_real_images_are_a_curve_and_nothing_else(made, project):
    page = (made / 'index.html').read_text(encoding='utf-8')
    shown = pictures(page)
    # Two of class 2, two of class 0 and the one of class 1; two rows of three of every other source but the real
    # images.
    assert len(shown) == page.count('<img') == 5 + 6 + 6 + 6
    photographs = [np.asarray(Image.open(path)).astype(int) for path in project.folder.glob('data/train/*/*.png')]
    assert len(photographs) == 6
    for picture in shown:
        assert min(np.abs(picture.astype(int) - photograph).mean() for photograph in photographs) > 20
    assert page.count('stroke: var(--c2)') == 2  # in the chart and in its legend
    assert 'real images' in page and 'Of real images there is a curve only' in page
    assert [path.name for path in sorted(made.iterdir())] == ['index.html', 'samples.png']


def test_classes_stand_below_their_pictures(made):
    page = (made / 'index.html').read_text(encoding='utf-8')
    assert re.findall(r'<figcaption>([^<]+)<', page) == ['class 2', 'class 0', 'class 1', 'class 2', 'class 0']
    wanted = SPEC.to_raw(PinkNoise()(6, (32, 32), SPEC))[[1, 2, 0, 3, 4]].permute(0, 2, 3, 1).numpy()
    for picture, exact in zip(pictures(page), wanted):
        assert np.abs(picture - exact).mean() < 20  # JPEG of noise


def test_the_page_needs_nothing_else_and_escapes_names(made):
    page = (made / 'index.html').read_text(encoding='utf-8')
    bare = re.sub(r'base64,[A-Za-z0-9+/=]+', '', page)
    assert (
        '://' not in bare
        and '<script' not in bare
        and 'url(' not in bare
        and 'V1 &lt;a&gt;' in bare
        and '<a>' not in bare
    )
    assert 'width=device-width' in bare and bare.count('class="scroll"') == bare.count('<table') == 1


def test_the_picture_is_small_and_as_wide_as_promised(made):
    file = made / 'samples.png'
    assert Image.open(file).width == sample_page.WIDTH and file.stat().st_size <= 400_000


def test_numbers_are_those_of_the_model(config, labelled):
    sources = sample_page.measure_all(load_config(str(config)), {'V1': labelled}, real=2, say=lambda line: None)
    assert [s.name for s in sources] == ['V1', 'Gaussian noise', '1/f noise', 'real images']
    assert sources[-1].pictures == [] and sources[-1].count == 2 and len({s.style for s in sources}) == 4
    teacher, size = sample_page.load_teacher(load_config(str(config)))
    noise = GaussianNoise()(32, size, teacher.image_spec, torch.Generator().manual_seed(0))
    blocks = similarity_densities(teacher.model, noise)
    assert sources[1].density.entropy == pytest.approx(sum(b.entropy for b in blocks) / 3)
    assert sources[1].mean == pytest.approx(sum(float((b.centers * b.density).sum()) / 50 for b in blocks) / 3)
    torch.testing.assert_close(sources[1].density.density, torch.stack([b.density for b in blocks]).mean(0))
    content = torch.load(labelled)
    logits = teacher.run(content['samples'], with_logits=True).logits
    assert sources[0].agreement == pytest.approx(float((logits.argmax(1) == content['labels']).float().mean()))
    assert sources[1].agreement is None


def test_the_share_is_one_for_what_the_model_says_itself(config):
    teacher, size = sample_page.load_teacher(load_config(str(config)))
    samples = GaussianNoise()(9, size, teacher.image_spec)
    labels = teacher.run(samples, with_logits=True).logits.argmax(1)
    assert sample_page.share_classified(teacher, samples, labels) == 1
    labels[:3] = (labels[:3] + 1) % 3
    assert sample_page.share_classified(teacher, samples, labels) == pytest.approx(6 / 9)
    assert sample_page.share_classified(teacher, samples, None) is None


def test_class_tokens_are_no_patches():
    teacher = TaskModel(build_classifier('mmpretrain-vit', quant='w8a8'))
    assert teacher.prefix_tokens == 1
    set_mode(teacher.model, 'off')
    samples = GaussianNoise()(2, (32, 32), teacher.image_spec)
    found = sample_page.measure(teacher, 'x', 0, samples, None, ())
    without, with_token = (similarity_densities(teacher.model, samples, drop_tokens=n) for n in (1, 0))
    assert torch.equal(found.density.density, sum(b.density for b in without) / 4)
    assert not torch.equal(found.density.density, sum(b.density for b in with_token) / 4)


def test_named_classes_are_chosen():
    labels = torch.tensor([5, 3, 5, 8, 3, 9])
    assert sample_page.picked(6, labels, 1, (), 'a') == [(0, 'class 5'), (1, 'class 3'), (3, 'class 8')]
    assert sample_page.picked(6, labels, 2, (9, 5), 'a') == [(5, 'class 9'), (0, 'class 5'), (2, 'class 5')]
    assert sample_page.picked(2, None, 1, (), 'a') == [(0, ''), (1, '')]


@pytest.mark.parametrize(
    'arguments, words',
    [
        (['V1=absent.pt'], 'V1=absent.pt does not exist'),
        (['absent.pt'], 'not of the form NAME=PATH'),
        (['real images={v1}'], 'give another name'),
        (['a={v1}', 'a={v1}'], 'give another name'),
        (['a={v1}', '--classes', '7'], 'a has no sample of the classes 7: it has 0, 1, 2'),
        (['a={v1}', '--real', '0'], 'must be at least 1'),
        (['a={v1}', '--cfg-options', 'load_from=absent.pth'], 'absent.pth does not exist'),
        (['a={v1}', '--cfg-options', 'dfq.size=(64,64)'], 'set dfq.size=(32, 32)'),
        (['a={config}'], 'damaged or no checkpoint'),
    ],
)
def test_mistakes_are_one_sentence(config, labelled, tmp_path, capsys, arguments, words):
    given = [entry.format(v1=labelled, config=config) for entry in arguments]
    assert sample_page.main([str(config), '--out', str(tmp_path), '--samples', *given]) == 1
    error = capsys.readouterr().err
    assert words in error and error.count('\n') == 1 and 'Traceback' not in error
    assert list(tmp_path.iterdir()) == []


def test_a_config_that_is_not_there(tmp_path, capsys, labelled):
    assert sample_page.main([str(tmp_path / 'no.py'), '--samples', f'a={labelled}', '--out', str(tmp_path)]) == 1
    assert 'there is no config file' in capsys.readouterr().err


def test_colours_give_way_to_the_size():
    noise = np.random.default_rng(0).integers(0, 256, (100, 100, 3), dtype=np.uint8)
    large, small = sample_page.encode(noise, 400), sample_page.encode(noise, 8)
    assert len(small) <= 8000 < len(large)
    with pytest.raises(ValueError, match='is too little'):
        sample_page.encode(noise, 1)
