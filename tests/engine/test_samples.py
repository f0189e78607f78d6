"""Samples kept by one run and used by another."""

import contextlib
import re
import shutil

import numpy as np
import pytest
import torch
from classifier_models import CLASSIFIER, IMAGENET
from PIL import Image
from tiny import DETECTOR, Project
from torch import nn

from psaq_mm.commands.dfq_train import main as dfq_train
from psaq_mm.engine.checkpoint import read_checkpoint
from psaq_mm.engine.data_overlap import check_folder
from psaq_mm.engine.runner import clock
from psaq_mm.engine.samples import Folder, build_source, load_samples, save_samples
from psaq_mm.errors import CheckpointError, ConfigError, DataError
from psaq_mm.models.task import reads_rgb
from psaq_mm.pictures import GaussianNoise, ImageSpec, SampleStream
from psaq_mm.pictures.base import mixed
from psaq_mm.psaq_vit import CoEvolution

pytestmark = pytest.mark.filterwarnings('ignore')
SPEC = ImageSpec(**IMAGENET)
V1 = dict(
    preset='psaq_v1', size=None, iters=0, evolve_every=0, calibration_samples=4, generator=dict(batch_size=4, steps=2)
)


class Model(nn.Module):
    """A model of which only the order of the channels is known."""

    def __init__(self, rgb=True):
        super().__init__()
        self.data_preprocessor = nn.Module()
        self.data_preprocessor.to_rgb = rgb


def samples(count=3, size=(6, 8), spec=SPEC):
    return GaussianNoise()(count, size, spec, torch.Generator().manual_seed(0))


def test_what_is_saved_is_read_to_the_last_bit(tmp_path):
    labels = torch.tensor([4, 0, 2])
    path = save_samples(tmp_path, samples(), Model(), SPEC, labels=labels, seed=7, settings=dict(steps=3))
    found = load_samples(path, (6, 8), Model(), SPEC)
    assert torch.equal(found.samples, samples()) and torch.equal(found.labels, labels)
    content = torch.load(path, weights_only=True)
    assert content['seed'] == 7 and content['size'] == [6, 8] and content['settings'] == dict(steps=3)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ['samples', 'samples.pt']


@pytest.mark.parametrize('rgb', [True, False])
@pytest.mark.parametrize('spec', [SPEC, ImageSpec(channels=1), ImageSpec((0.5,) * 3, (0.25,) * 3, max_value=1.0)])
def test_pictures_are_the_samples_at_8_bits_in_rgb(tmp_path, spec, rgb):
    made = samples(spec=spec)
    save_samples(tmp_path, made, Model(rgb), spec)
    (tmp_path / 'samples' / 'round_001_step_000000.png').write_bytes(b'a sheet')
    files = sorted((tmp_path / 'samples').glob('0*.png'))
    assert [f.name for f in files] == ['0000.png', '0001.png', '0002.png']
    shown = np.array(Image.open(files[1])).reshape(6, 8, -1)
    raw = (spec.to_raw(made) * 255 / spec.max_value)[1].round().permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(shown, raw if rgb else raw[..., ::-1])
    half_a_step = max(high - low for low, high in zip(spec.low, spec.high)) / 255 / 2
    found = load_samples(tmp_path / 'samples', (6, 8), Model(rgb), spec)
    assert found.labels is None and float((found.samples - made).abs().max()) <= half_a_step * 1.001


def test_another_normalization_and_order_of_channels_are_converted(tmp_path):
    path = save_samples(tmp_path, samples(), Model(rgb=True), SPEC)
    other = ImageSpec((10.0, 20.0, 30.0), (1.0, 2.0, 3.0))
    found = load_samples(path, (6, 8), Model(rgb=False), other)
    torch.testing.assert_close(other.to_raw(found.samples), SPEC.to_raw(samples()).flip(1), rtol=0, atol=1e-3)
    found = load_samples(path, (6, 8), Model(rgb=False), SPEC)
    torch.testing.assert_close(
        found.samples,
        SPEC.to_raw(samples())
        .flip(1)
        .sub(torch.tensor(IMAGENET['mean']).view(-1, 1, 1))
        .div(torch.tensor(IMAGENET['std']).view(-1, 1, 1)),
        rtol=0,
        atol=1e-5,
    )


def test_pictures_of_any_size_are_cropped_at_the_centre(tmp_path):
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 255
    Image.fromarray(wide).save(tmp_path / 'b.jpg', quality=95)
    Image.fromarray(wide[..., 0]).save(tmp_path / 'a.bmp')
    (tmp_path / 'notes.txt').write_text('none')
    found = load_samples(tmp_path, (10, 10), Model(), SPEC).samples
    assert found.shape == (2, 3, 10, 10)
    for picture in SPEC.to_raw(found):
        assert float(picture[:, 2:8, 2:8].min()) > 240


class Evil:
    def __reduce__(self):
        import os

        return os.system, ('touch ran',)


@pytest.mark.parametrize(
    'content, error, match',
    [
        (dict(state_dict={}), DataError, 'holds no samples'),
        (dict(samples=torch.zeros(0, 3, 6, 8)), DataError, 'damaged'),
        (dict(samples=torch.full((1, 3, 6, 8), torch.nan)), DataError, 'not finite'),
        (
            dict(samples=torch.zeros(1, 1, 6, 8), image_spec=dict(channels=1)),
            ConfigError,
            '1 channels and the model takes 3',
        ),
        (dict(samples=torch.zeros(1, 3, 8, 6)), ConfigError, r'\(8, 6\) and dfq.size is \(6, 8\)'),
        (dict(settings=Evil()), CheckpointError, 'could run code'),
    ],
)
def test_files_that_do_not_fit_are_named(tmp_path, content, error, match):
    whole = dict(samples=torch.zeros(1, 3, 6, 8), image_spec=dict(**IMAGENET), size=[6, 8], rgb=True)
    torch.save(content if 'state_dict' in content else {**whole, **content}, tmp_path / 'samples.pt')
    with pytest.raises(error, match=match) as caught:
        load_samples(tmp_path / 'samples.pt', (6, 8), Model(), SPEC)
    assert str(tmp_path) in str(caught.value)


def test_folders_that_do_not_fit_are_named(tmp_path):
    with pytest.raises(ConfigError, match='does not exist'):
        load_samples(tmp_path / 'nowhere.pt', (6, 8), Model(), SPEC)
    with pytest.raises(DataError, match='has no images'):
        load_samples(tmp_path, (6, 8), Model(), SPEC)
    (tmp_path / 'cut.png').write_bytes(b'\x89PNG')
    with pytest.raises(DataError, match='cut.png cannot be read'):
        load_samples(tmp_path, (6, 8), Model(), SPEC)
    with pytest.raises(ConfigError, match='takes 5 channels'):
        load_samples(tmp_path, (6, 8), Model(), ImageSpec(channels=5))


def test_order_of_the_channels_as_the_libraries_have_it():
    pytest.importorskip('mmpretrain')
    from mmengine.model import BaseDataPreprocessor, ImgDataPreprocessor
    from mmpretrain.models.utils.data_preprocessor import ClsDataPreprocessor

    def model(preprocessor):
        model = nn.Module()
        model.data_preprocessor = preprocessor
        return model

    assert reads_rgb(model(ImgDataPreprocessor(bgr_to_rgb=True))) and not reads_rgb(model(ImgDataPreprocessor()))
    assert reads_rgb(model(ClsDataPreprocessor(to_rgb=True))) and not reads_rgb(model(ClsDataPreprocessor()))
    assert reads_rgb(model(None)) and not reads_rgb(model(BaseDataPreprocessor())), 'pictures are loaded blue first'


@pytest.fixture(scope='module')
def project(tmp_path_factory):
    pytest.importorskip('mmpretrain')
    project = Project(tmp_path_factory.mktemp('samples'), CLASSIFIER)
    project.student = run(project, 'first', save_samples=True)
    return project


def run(project, name, **dfq):
    path = project.config(name=f'{name}.py', **{**V1, **dfq})
    assert dfq_train([str(path), '--work-dir', str(project.folder / name)]) == 0
    return read_checkpoint(project.folder / name / 'student.pth')


def log_of(project, name):
    return next((project.folder / name).glob('*/*.log')).read_text()


def test_ranges_from_saved_samples_are_those_of_the_run_that_made_them(project):
    saved = project.folder / 'first' / 'samples.pt'
    content = torch.load(saved, weights_only=True)
    assert content['samples'].shape == (4, 3, 32, 32) and content['labels'].shape == (4,)
    assert content['settings']['generator']['jitter'] == [15, 30]
    again = run(project, 'again', samples=str(saved))
    for key, value in project.student['state_dict'].items():
        torch.testing.assert_close(again['state_dict'][key], value, rtol=0, atol=0, equal_nan=True, msg=key)
    assert again['meta']['psaq_mm']['dfq']['samples'] == str(saved)
    log = log_of(project, 'again')
    assert f'Using 4 of the 4 samples in {saved}' in log and 'Samples [' not in log


def test_fewer_samples_than_asked_for(project, tmp_path):
    shutil.copytree(project.folder / 'first' / 'samples', tmp_path / 'samples')
    few = run(project, 'few', samples=str(tmp_path / 'samples'), calibration_samples=6)
    assert few['meta']['psaq_mm']['dfq']['calibration_samples'] == 4
    assert 'Using 4 of the 4' in log_of(project, 'few') and 'asks for 6' in log_of(project, 'few')


def test_first_samples_are_given_and_later_ones_are_made(project):
    student = run(
        project,
        'train',
        preset='psaq_v2',
        samples=str(project.folder / 'first' / 'samples.pt'),
        iters=2,
        evolve_every=1,
        calibration_samples=3,
    )
    log = log_of(project, 'train')
    assert 'Using 3 of the 4' in log and 'Samples [' in log and student['meta']['psaq_mm']['dfq']['rounds'] == 2


def test_samples_beside_another_source(project, tmp_path, capsys):
    path = project.config(name='both.py', source='gaussian', samples='here.pt', size=None)
    assert dfq_train([str(path), '--work-dir', str(tmp_path)]) == 1
    assert 'here.pt' in (error := capsys.readouterr().err) and 'gaussian' in error


def test_a_detector_runs_v1_class_free_and_says_so(tmp_path):
    pytest.importorskip('mmdet')
    project = Project(tmp_path, DETECTOR)
    run(project, 'v1', size=(64, 96), calibration_samples=2, generator=dict(batch_size=2, steps=1), save_samples=True)
    log = log_of(project, 'v1')
    assert 'MaskRCNN is no classifier: samples are made class-free' in log and 'class:' not in log
    assert torch.load(tmp_path / 'v1' / 'samples.pt', weights_only=True)['labels'] is None


# ---------------------------------------------------------------------- sources
MIXED = [dict(type='psaq_mm.PinkNoise', weight=3), dict(type='psaq_mm.DeadLeaves'), dict(type='psaq_mm.Generated')]
TRAINED = dict(
    preset='psaq_v2',
    iters=3,
    evolve_every=2,
    evolve_samples=4,
    calibration_samples=10,
    pool_size=12,
    generator=dict(batch_size=4, steps=1),
    save_samples=True,
)


def test_a_mixture_of_procedural_and_generated_samples(project):
    student = run(project, 'mixture', samples=MIXED, **TRAINED)
    summary = student['meta']['psaq_mm']['dfq']
    assert (
        summary['samples'] == MIXED
        and summary['fresh'] is False
        and summary['fresh_samples'] == 0
        and summary['rounds'] == 2
    )
    log = log_of(project, 'mixture')
    assert '(PinkNoise, DeadLeaves, Generated)' in log and 'discrepancy: ' in log, 'the generated ones compete'
    made = torch.load(project.folder / 'mixture' / 'samples.pt', weights_only=True)
    assert len(made['samples']) == 10 and made['labels'] is None
    stream = SampleStream(build_source(MIXED), (32, 32), SPEC, seed=0)
    chosen = stream.source.members(range(10), stream.seed)
    wanted = torch.stack(
        [
            build_source(MIXED[:2]).sources[int(k)].draw([i], (32, 32), SPEC, mixed(stream.seed, 0))[0]
            for i, k in enumerate(chosen)
            if k < 2
        ]
    )
    torch.testing.assert_close(made['samples'][chosen < 2], wanted, rtol=0, atol=1e-6)


def test_the_name_of_a_source_and_its_dict_are_two_spellings(project):
    for name, dfq in dict(
        named=dict(source='dead_leaves'), spelled=dict(samples=dict(type='psaq_mm.DeadLeaves'))
    ).items():
        student = run(project, name, save_samples=True, classes=None, **dfq)
        assert student['meta']['psaq_mm']['dfq']['samples'] == dfq.get('source', dfq.get('samples'))
        samples = torch.load(project.folder / name / 'samples.pt', weights_only=True)['samples']
        assert len(samples.flatten(1).unique(dim=0)) == 4 and 'Samples [' not in log_of(project, name)


def test_fresh_batches_are_not_those_of_the_pool(project, monkeypatch):
    from psaq_mm.calibration import StudentTraining

    seen = []
    draw = StudentTraining.draw
    monkeypatch.setattr(
        StudentTraining, 'draw', lambda self, *given: seen.append((self, draw(self, *given))) or seen[-1][1]
    )
    options = dict(
        preset='fast', samples=None, source='pink', iters=4, augment=False, calibration_samples=4, pool_size=4
    )
    student = run(project, 'fresh', fresh=True, **options)
    assert student['meta']['psaq_mm']['dfq']['fresh_samples'] == 8
    pool = seen[0][0].pool.samples
    batches = torch.cat([batch for _, batch in seen])
    assert len(batches.flatten(1).unique(dim=0)) == 8
    assert not any(torch.equal(one, kept) for one in batches for kept in pool)


def test_a_resumed_run_goes_on_with_the_next_fresh_samples(project, tmp_path):
    options = dict(preset='fast', iters=4, calibration_samples=4, pool_size=4, checkpoint_interval=2)
    whole = run(project, 'whole', **options)
    path = project.folder / 'whole.py'
    shutil.copytree(project.folder / 'whole', tmp_path / 'w')
    (tmp_path / 'w' / 'iter_4.pth').unlink()
    assert dfq_train([str(path), '--work-dir', str(tmp_path / 'w'), '--resume']) == 0
    again = read_checkpoint(tmp_path / 'w' / 'student.pth')['state_dict']
    assert all(torch.equal(again[k], v) or not torch.isfinite(v).all() for k, v in whole['state_dict'].items())


def test_synthesis_that_begins_with_a_source(project):
    student = run(
        project,
        'begin',
        preset='calibrate',
        calibration_samples=4,
        generator=dict(batch_size=4, steps=1, init=dict(type='Folder', path=str(project.folder / 'first' / 'samples'))),
    )
    assert 'Folder' in student['meta']['psaq_mm']['dfq']['generator']['init']


class Clock:
    """A clock on which every look takes a quarter of a second: seconds that are the same on every machine."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        self.now += 0.25
        return self.now


def test_a_budget_of_seconds_ends_the_run_and_its_learning_rate(project, monkeypatch):
    monkeypatch.setattr(clock, 'time', Clock())
    options = dict(preset='fast', iters=100000, calibration_samples=4, pool_size=4, lr=1e-3)
    student = run(project, 'budget', max_seconds=20.0, log_interval=1, **options)
    steps = student['meta']['psaq_mm']['dfq']['steps']
    rates = [float(rate) for rate in re.findall(r'lr: (\S+)', log_of(project, 'budget'))]
    assert 8 < steps < 40 and len(rates) == steps
    assert rates == sorted(rates, reverse=True) and rates[0] > 9e-4 and rates[-1] < 3e-5
    none = run(project, 'nothing', max_seconds=0.5, **options)
    assert none['meta']['psaq_mm']['dfq']['steps'] == 0 and 'No time is left' in log_of(project, 'nothing')


def test_a_round_of_synthesis_that_does_not_fit_is_left_out(project, monkeypatch):
    hands, evolve = Clock(), CoEvolution.evolve
    monkeypatch.setattr(clock, 'time', hands)
    monkeypatch.setattr(CoEvolution, 'evolve', lambda self: setattr(hands, 'now', hands.now + 30) or evolve(self))
    options = dict(
        preset='psaq_v2',
        iters=100000,
        evolve_every=2,
        calibration_samples=4,
        pool_size=4,
        evolve_samples=2,
        generator=dict(batch_size=4, steps=1),
    )
    student = run(project, 'rounds', max_seconds=50.0, **options)['meta']['psaq_mm']['dfq']
    assert student['rounds'] == 2 and student['steps'] > 8


@pytest.mark.parametrize('fails', [False, True])
def test_a_pause_is_no_time_of_the_run(monkeypatch, fails):
    hands = Clock()
    monkeypatch.setattr(clock, 'time', hands)
    run_clock = clock.RunClock(budget=1000.0)
    before = run_clock.elapsed
    with contextlib.suppress(ValueError), run_clock.paused():
        hands.now += 100
        inside = run_clock.elapsed
        if fails:
            raise ValueError
    assert inside - before <= 0.5 and run_clock.elapsed - before <= 1 and 100 <= run_clock.paused_seconds <= 101
    assert run_clock.has_time_for(990) and not run_clock.has_time_for(1001)


def test_the_time_of_a_part_counts_also_where_it_fails(monkeypatch):
    hands = Clock()
    monkeypatch.setattr(clock, 'time', hands)
    run_clock = clock.RunClock()
    for _ in range(2):
        with contextlib.suppress(ValueError), run_clock.counted('student'):
            hands.now += 3
            raise ValueError
    assert run_clock.seconds == dict(synthesis=0.0, student=6.5) and run_clock.share == 0.0


@pytest.mark.parametrize(
    'dfq, words',
    [
        (dict(samples=dict(type='psaq_mm.Pink')), ["'psaq_mm.Pink'", 'PinkNoise']),
        (dict(samples=dict(type='psaq_mm.PinkNoise', exponents=1)), ['exponents']),
        (dict(samples=[dict(type='psaq_mm.PinkNoise')], source='real'), ['contradict', 'real']),
        (dict(samples=dict(type='psaq_mm.Folder', path='/nowhere/at/all')), ['/nowhere/at/all']),
        (dict(preset='psaq_v2', iters=1, fresh=True), ['dfq.fresh=True', 'generated', "'pink'"]),
        (dict(iters=1, fresh=1.5), ['dfq.fresh=1.5', 'True']),
        (dict(iters=1, max_seconds=0), ['dfq.max_seconds=0']),
        (dict(source='dead_leafs'), ['dead_leafs']),
    ],
)
def test_sources_that_do_not_fit_are_named(project, tmp_path, capsys, dfq, words):
    # A name of its own: MMEngine keeps loggers by name and second.
    path = project.config(name=f'{tmp_path.name}.py', **{**V1, **dfq})
    assert dfq_train([str(path), '--work-dir', str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and 'Traceback' not in error
    for word in words:
        assert word in error, error


def test_a_folder_gives_each_of_its_images_once_a_turn(tmp_path):
    for number in range(5):
        Image.fromarray(np.full((8, 8, 3), 50 * number, np.uint8)).save(tmp_path / f'{number}.png')
    folder = build_source(dict(type='Folder', path=str(tmp_path)))
    shades = SPEC.to_raw(folder.draw(range(10), (8, 8), SPEC, seed=3)).mean((1, 2, 3)).round().tolist()
    assert sorted(shades[:5]) == sorted(shades[5:]) == [0, 50, 100, 150, 200] and shades[:5] != shades[5:]
    assert shades == [float(SPEC.to_raw(folder.draw([i], (8, 8), SPEC, seed=3)).mean().round()) for i in range(10)]
    other = SPEC.to_raw(folder.draw(range(10), (8, 8), SPEC, seed=4)).mean((1, 2, 3)).round().tolist()
    assert other != shades
    saved = Folder(str(save_samples(tmp_path / 's', samples(), Model(), SPEC)), rgb=True)
    drawn = saved.draw([2, 0, 1], (6, 8), SPEC)
    assert sorted(drawn.sum((1, 2, 3)).tolist()) == sorted(samples().sum((1, 2, 3)).tolist())


def test_a_folder_that_is_evaluated_is_refused(tmp_path):
    (tmp_path / 'test' / 'a').mkdir(parents=True)
    (tmp_path / 'other').mkdir()
    config = dict(test_dataloader=dict(dataset=dict(data_root=str(tmp_path), data_prefix='test')))
    for folder in ('test', 'test/a'):
        with pytest.raises(ConfigError, match='test_dataloader reads its pictures'):
            check_folder(config, tmp_path / folder)
    check_folder(config, tmp_path / 'other')
    check_folder(config, tmp_path / 'samples.pt')
    a, b = str(tmp_path / 'test'), str(tmp_path / 'other')
    nested = [a, dict(type='Mixture', sources=[dict(type='Folder', path=b)]), 'pink']
    assert build_source(nested).paths == [a, b]
    with pytest.raises(ConfigError, match='test_dataloader reads its pictures'):
        build_source(nested, Model(), config)
