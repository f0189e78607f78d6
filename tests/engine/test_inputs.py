"""The range of a model's input: derived from pipeline and preprocessor, given, or refused by one sentence."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import DETECTOR, Project
from tiny_classifier import ClassifierProject
from torch import nn

from psaq_mm.commands.dfq_train import main as dfq_train
from psaq_mm.commands.sensitivity import main as sensitivity
from psaq_mm.engine.checkpoint import read_checkpoint
from psaq_mm.engine.inputs import check_preprocessor, read_pipeline, set_input_
from psaq_mm.engine.methods import METHODS
from psaq_mm.engine.presets import resolve_dfq, with_method
from psaq_mm.engine.samples import load_samples, save_samples
from psaq_mm.errors import ConfigError
from psaq_mm.models import TaskModel
from psaq_mm.models.task import reads_rgb
from psaq_mm.pictures import GaussianNoise, ImageSpec, PinkNoise
from psaq_mm.pictures.image_spec import fits_eight_bits
from psaq_mm.visualization import to_pixels

pytestmark = pytest.mark.filterwarnings('ignore')

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
NORMALIZE = dict(type='Normalize', mean=MEAN, std=STD, to_rgb=True)
LOAD = dict(type='LoadImageFromFile')
DEEP = dict(type='LoadImageFromFile', color_type='unchanged')


class Model(nn.Module):
    """A model of which only the preprocessor and the first layer are known."""

    def __init__(self, mean=None, std=None, channels=3, turned=None):
        super().__init__()
        self.backbone = nn.Conv2d(channels, 4, 2)
        self.data_preprocessor = nn.Module()
        if mean is not None:
            for name, values in (('mean', mean), ('std', std)):
                self.data_preprocessor.register_buffer(name, torch.tensor(values).view(-1, 1, 1), False)
        if turned is not None:
            self.data_preprocessor._channel_conversion = turned


def config(*steps):
    return dict(
        test_dataloader=dict(
            dataset=dict(type='ConcatDataset', datasets=[dict(pipeline=[LOAD, *steps, dict(type='PackInputs')])])
        )
    )


def spans(spec, low, high):
    return np.allclose(spec.low, low, atol=0.01) and np.allclose(spec.high, high, atol=0.01)


@pytest.mark.parametrize(
    'mean, std, steps, low, high',
    [
        ((), (), (), (0, 0, 0), (255, 255, 255)),
        (MEAN, STD, (), (-2.118, -2.036, -1.804), (2.249, 2.429, 2.64)),
        ((), (), (NORMALIZE,), (-2.118, -2.036, -1.804), (2.249, 2.429, 2.64)),
        (
            (0.485, 0.456, 0.406),
            (0.229, 0.224, 0.225),
            (dict(type='Normalize', mean=[0] * 3, std=[255] * 3, to_rgb=False),),
            (-2.118, -2.036, -1.804),
            (2.249, 2.429, 2.64),
        ),
        (
            (),
            (),
            (
                dict(type='torchvision/ToTensor'),
                dict(type='torchvision/Normalize', mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
            ),
            (-2.118, -2.036, -1.804),
            (2.249, 2.429, 2.64),
        ),
        (
            (),
            (),
            (dict(type='Albu', transforms=[dict(type='Normalize')]),),
            (-2.118, -2.036, -1.804),
            (2.249, 2.429, 2.64),
        ),
        ((127.5,), (127.5,), (), (-1,) * 3, (1,) * 3),
        ((0.0,), (255.0,), (), (0,) * 3, (1,) * 3),
        (MEAN, (1.0, 1.0, 1.0), (), (-123.675, -116.28, -103.53), (131.325, 138.72, 151.47)),
    ],
)
def test_the_range_is_derived_from_pipeline_and_preprocessor(mean, std, steps, low, high):
    model = Model(mean or None, std or None)
    set_input_(model, config(*steps))
    assert spans(TaskModel(model).image_spec, low, high)


@pytest.mark.parametrize(
    'mean, std',
    [
        ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
        ((103.53, 116.28, 123.675), (1.0, 1.0, 1.0)),
        ((33.46,), (78.87,)),
        ((127.5,) * 3, (127.5,) * 3),
        ((0.0,) * 3, (255.0,) * 3),
        ((122.771, 116.746, 104.094), (68.5, 66.632, 70.323)),
        ((114.75,) * 3, (57.375,) * 3),
        ((125.307, 122.961, 113.8575), (51.5865, 50.847, 51.255)),
        ((0.0,) * 3, (1.0,) * 3),
    ],
)
def test_normalizations_of_the_libraries_own_configs_are_of_8_bits(mean, std):
    assert fits_eight_bits(mean, std)


@pytest.mark.parametrize('method', METHODS)
def test_a_given_range_outlives_another_method(method):
    assert resolve_dfq(with_method(dict(value_range=(0, 65535)), method))['value_range'] == (0, 65535)


def test_a_spec_of_8_bits_is_what_it_was_to_the_last_bit():
    for model in (Model(MEAN, STD), Model(), Model((0.0,), (255.0,)), Model((33.46,), (78.87,), channels=1)):
        before = TaskModel(model).image_spec
        set_input_(model, config(dict(type='Resize', scale=32)))
        assert (
            TaskModel(model).image_spec == before
            and before.low == tuple((0.0 - m) / s for m, s in zip(before.mean, before.std))
            or not before.mean
        )


def test_the_order_of_the_channels_counts_pipeline_and_preprocessor():
    for steps, turned, rgb in (
        ((NORMALIZE,), None, True),
        ((NORMALIZE,), False, True),
        ((), True, True),
        ((), False, False),
        ((NORMALIZE,), True, False),
        ((dict(NORMALIZE, to_rgb=False),), None, False),
    ):
        model = Model(turned=turned)
        set_input_(model, config(*steps))
        assert reads_rgb(model) == rgb
        if steps and turned:  # turned twice: the network sees blue first, and the means are in that order
            assert spans(TaskModel(model).image_spec, (-1.804, -2.036, -2.118), (2.64, 2.429, 2.249))


@pytest.mark.parametrize(
    'mean, std, steps',
    [
        ((9000.0,), (4000.0,), ()),
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), ()),
        ((-500.0,), (300.0,), ()),
        ((200.0,), (150.0,), ()),
        (MEAN, STD, (NORMALIZE,)),
        ((), (), (DEEP,)),
        ((), (), (dict(type='LoadImageFromFile', imdecode_backend='tifffile'),)),
        ((), (), (dict(type='LoadMultiChannelImageFromFiles'),)),
        ((123.0, 117.0, 104.0, 0.5), (58.0, 57.0, 57.0, 0.2), ()),
    ],
)
def test_a_range_that_is_not_known_is_refused_and_given_by_one_key(mean, std, steps):
    channels = max(3, len(mean))
    model = Model(mean or None, std or None, channels)
    with pytest.raises(ConfigError, match=r'dfq\.value_range=\(low, high\)'):
        set_input_(model, config(*steps))
    if mean and not steps:  # without a config too
        with pytest.raises(ConfigError, match=r'dfq\.value_range=\(low, high\)'):
            TaskModel(model).image_spec  # noqa: B018
    spec = set_input_(model, config(*steps), (-1000, [65535] * channels)).spec
    assert spec.min_value == -1000 and spec.max_value == 65535
    assert spans(
        spec,
        *(
            [(v - m) / s for m, s in zip(spec.mean, spec.std)] if mean and not steps else getattr(spec, side)
            for v, side in ((-1000, 'low'), (65535, 'high'))
        ),
    )
    assert set_input_(model, config(*steps), None, strict=False).spec.channels == channels


def test_what_a_pipeline_leaves_open_is_said(capfd):
    from mmengine.logging import MMLogger

    MMLogger.get_instance('open')
    for steps, mean, said in (
        ((dict(type='MySpectrum'),), None, 'MySpectrum'),
        ((dict(type='MySpectrum'),), MEAN, ''),
        ((DEEP,), MEAN, 'unchanged'),
        ((dict(type='Resize', scale=8),), None, ''),
    ):
        model = Model(mean, STD if mean else None)
        capfd.readouterr()
        set_input_(model, config(*steps))
        found = ''.join(capfd.readouterr())
        assert ('dfq.value_range' in found and said in found) if said else 'value_range' not in found


@pytest.mark.parametrize('given', [5, (1,), (0, 0), (9, 1), ('a', 'b'), (0, float('nan')), (0, [1, 2]), (1, 2, 3)])
def test_a_range_that_is_none_is_refused(given):
    with pytest.raises(ConfigError, match='dfq.value_range='):
        set_input_(Model(), config(), given)


@pytest.mark.parametrize(
    'given, words',
    [
        (dict(mean=[1.0] * 3, std=[1.0, 0.0, 1.0]), r'data_preprocessor\.std=\[1.0, 0.0, 1.0\] above 0'),
        (dict(mean=[1.0] * 3), 'std is not set'),
        (dict(mean=[1.0] * 3, std=[1.0] * 2), 'mean has 3 values and data_preprocessor.std 2'),
        (dict(mean='x', std=[1.0]), 'no list of numbers'),
        (dict(type='mmdet.DetDataPreprocessor', mean=[1.0] * 4, std=[1.0] * 4), 'takes 1 or 3'),
        (dict(mean=None, std=None), None),
    ],
)
def test_a_preprocessor_that_makes_no_sense_is_refused(given, words):
    if words is None:
        return check_preprocessor(dict(model=dict(data_preprocessor=given)))
    for place in (dict(model=dict(data_preprocessor=given)), dict(data_preprocessor=given)):
        with pytest.raises(ConfigError, match=words):
            check_preprocessor(place)


def test_a_mean_of_other_channels_than_the_model_is_refused():
    model = Model([100.0] * 4, [50.0] * 4)
    for ask in (lambda: TaskModel(model).image_spec, lambda: set_input_(model, config())):
        with pytest.raises(ConfigError, match='4 values and the model takes 3 channels'):
            ask()
    with pytest.raises(ConfigError, match='Normalize in the pipeline has 3 values and the model takes 4 channels'):
        set_input_(Model(channels=4), config(NORMALIZE))


def test_branches_and_dataset_wrappers_are_read():
    branch = dict(
        type='TestTimeAug', transforms=[[dict(type='Resize', scale=8)], [NORMALIZE], [dict(type='PackInputs')]]
    )
    assert read_pipeline(config(branch)).mean == MEAN and read_pipeline(config(branch)).turned
    assert read_pipeline(dict(test_pipeline=[LOAD, NORMALIZE])).std == STD and read_pipeline({}).mean == ()
    assert read_pipeline(config(dict(type='Rerange'))).value_range == (0.0, 255.0)
    kinds = [
        type('Normalize', (), dict(__module__='mmcv.transforms')),
        type('ToTensor', (), dict(__module__='torchvision.transforms')),
    ]
    # classes, as in configs that are Python modules
    assert read_pipeline(config(dict(NORMALIZE, type=kinds[0]))).mean == MEAN
    assert read_pipeline(config(dict(type=kinds[1]))).std == (255.0,)


# ---------------------------------------------------------------------- readers of the range
DEEP_SPECS = [
    ImageSpec([9000.0] * 3, [4000.0] * 3, max_value=65535.0),
    ImageSpec([-500.0], [400.0], max_value=3000.0, min_value=-1024.0),
    ImageSpec([120.0] * 3, [60.0] * 3, max_value=(255.0, 255.0, 400.0), min_value=(0.0, 0.0, 100.0)),
]


@pytest.mark.parametrize('spec', DEEP_SPECS, ids=['16 bits', 'tomography', 'of each channel'])
def test_samples_fill_the_range_and_are_kept_and_shown_in_it(spec, tmp_path):
    noise = PinkNoise()(4, (32, 32), spec, torch.Generator().manual_seed(0))
    low, high = (torch.tensor(v).view(-1, 1, 1) for v in (spec.low, spec.high))
    assert (noise >= low).all() and (noise <= high).all() and noise.std() > 0.4
    torch.testing.assert_close(spec.from_unit(spec.to_unit(noise)), noise, rtol=1e-4, atol=1e-4)
    shown = to_pixels(noise, spec)
    assert shown.min() <= 20 and shown.std() > 5
    model = Model(channels=spec.channels, turned=True)
    path = save_samples(tmp_path, noise, model, spec)
    assert torch.equal(load_samples(path, (32, 32), model, spec).samples, noise)
    png = np.asarray(Image.open(tmp_path / 'samples' / '0000.png'))
    np.testing.assert_array_equal(png if png.ndim == 3 else np.repeat(png[..., None], 3, -1), shown[0])
    again = load_samples(tmp_path / 'samples', (32, 32), model, spec).samples  # 8 bits of the whole range
    assert ((again - noise).abs() <= (high - low) / 255).all()
    other = ImageSpec(MEAN, STD) if spec.channels == 3 else ImageSpec([100.0], [50.0])
    torch.testing.assert_close(
        other.to_unit(load_samples(path, (32, 32), model, other).samples), spec.to_unit(noise), rtol=0, atol=1e-4
    )


def test_units_of_pictures_that_rarely_use_their_range_are_the_data_sets_own():
    spec = ImageSpec([9000.0] * 3, [4000.0] * 3, max_value=65535.0)
    noise = GaussianNoise()(2, (64, 64), spec, torch.Generator().manual_seed(0))
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    # 8 bits: as it was
    assert not torch.equal(ImageSpec([100.0], [20.0]).to_standard(torch.zeros(1, 1, 1)), torch.zeros(1, 1, 1))


def test_pictures_of_16_bits_in_a_folder_hold_raw_values(tmp_path):
    raw = np.random.default_rng(0).integers(0, 40000, (16, 16)).astype(np.uint16)
    Image.fromarray(raw).save(tmp_path / 'deep.png')
    model, spec = Model(channels=1), ImageSpec([9000.0], [4000.0], max_value=65535.0)
    found = load_samples(tmp_path, (16, 16), model, spec).samples
    np.testing.assert_allclose(spec.to_raw(found)[0, 0].numpy(), raw, atol=0.5)
    # a model of 8 bits: as bright as the picture's 8-bit form, where clipping made it white
    plain = ImageSpec([100.0], [50.0])
    shown = plain.to_raw(load_samples(tmp_path, (16, 16), model, plain).samples)
    np.testing.assert_allclose(shown[0, 0].numpy(), raw / 257.0, atol=0.5)


# ---------------------------------------------------------------------- whole runs
@pytest.fixture(scope='module')
def detector(tmp_path_factory):
    return Project(tmp_path_factory.mktemp('deep'), DETECTOR)


def run(project, name, *options, more='', **dfq):
    path = project.config(
        name=f'{name}.py', iters=0, evolve_every=0, save_samples=True, samples=dict(type='psaq_mm.GaussianNoise'), **dfq
    )
    path.write_text(path.read_text() + more)
    out = project.folder / name
    return dfq_train([str(path), '--work-dir', str(out), '--cfg-options', *options]), out


def test_a_detector_of_16_bits_is_refused_or_calibrated_on_its_range(detector, capfd):
    options = ['model.data_preprocessor.mean=[9000.,9000.,9000.]', 'model.data_preprocessor.std=[4000.,4000.,4000.]']
    status, out = run(detector, 'refused', *options)
    assert status == 1 and not (out / 'student.pth').exists()
    assert 'dfq.value_range=(low, high)' in capfd.readouterr().err
    status, out = run(detector, 'given', *options, value_range=(0, 65535))
    samples = torch.load(out / 'samples.pt')['samples']
    assert status == 0 and samples.std() > 0.8 and samples.min() > -2.26
    assert read_checkpoint(str(out / 'student.pth'))['meta']['psaq_mm']['dfq']['value_range'] == [0, 65535]


def test_normalize_in_the_pipeline_gives_samples_in_its_units(detector):
    pipeline = [
        LOAD,
        dict(type='Resize', scale=(96, 64), keep_ratio=True),
        dict(type='Normalize', mean=list(MEAN), std=list(STD)),
        dict(type='PackDetInputs'),
    ]
    status, out = run(
        detector,
        'normalize',
        'model.data_preprocessor.mean=None',
        'model.data_preprocessor.std=None',
        'model.data_preprocessor.bgr_to_rgb=False',
        more=f'test_dataloader = dict(dataset=dict(pipeline={pipeline!r}))\n',
    )
    content = torch.load(out / 'samples.pt')
    assert status == 0 and -2.2 < content['samples'].min() and content['samples'].max() < 2.7 and content['rgb'] is True


def test_an_export_normalizes_as_the_pipeline_does(tmp_path):
    pytest.importorskip('mmpretrain')
    pytest.importorskip('onnxruntime')
    from psaq_mm.commands.common import load_config
    from psaq_mm.deploy import load
    from psaq_mm.engine.exporting import export

    project = ClassifierProject(tmp_path, per_class=1)
    path = project.config(size=(32, 32), iters=0, evolve_every=0)
    pipeline = [LOAD, dict(type='Normalize', mean=list(MEAN), std=list(STD)), dict(type='PackInputs')]
    path.write_text(
        path.read_text() + f'test_dataloader = dict(dataset=dict(pipeline={pipeline!r}))\n'
        'data_preprocessor = dict(mean=None, std=None, to_rgb=False)\n'
    )
    assert dfq_train([str(path), '--work-dir', str(tmp_path / 'run')]) == 0
    exported = export(load_config(str(path)), str(tmp_path / 'run' / 'student.pth'), str(tmp_path / 'out'), [(32, 32)])[
        1
    ]
    assert exported.manifest['mean'] == pytest.approx(list(MEAN)) and exported.manifest['reverse_channels'] is True
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    normalized = (picture[..., ::-1] - np.float32(MEAN)) / np.float32(STD)
    np.testing.assert_allclose(
        load(tmp_path / 'out', 'onnxruntime').normalize(picture)[0], normalized.transpose(2, 0, 1), atol=1e-5
    )


def test_channels_are_turned_where_there_are_three_alone():
    from psaq_mm.deploy.export import _image_settings

    assert _image_settings(Model(MEAN, STD, turned=True))['reverse_channels'] is True
    assert _image_settings(Model(channels=4, turned=True))['reverse_channels'] is False


def test_sensitivity_names_the_key_too(detector, capfd):
    path = detector.config(name='sensitive.py')
    assert (
        sensitivity(
            [
                str(path),
                str(detector.checkpoint),
                '--number',
                '1',
                '--work-dir',
                str(detector.folder / 's'),
                '--cfg-options',
                'model.data_preprocessor.mean=[9000.,9000.,9000.]',
                'model.data_preprocessor.std=[4000.,4000.,4000.]',
            ]
        )
        == 1
    )
    assert 'dfq.value_range' in capfd.readouterr().err


@pytest.mark.parametrize(
    'options, words',
    [
        (['mean=[1.,1.,1.,1.]', 'std=[1.,1.,1.,1.]'], 'takes 1 or 3'),
        (['std=[1.,0.,1.]'], 'above 0'),
        (['std=None'], 'give both'),
    ],
)
def test_a_run_refuses_a_bad_preprocessor_before_it_begins(detector, options, words, capfd):
    status, out = run(detector, 'bad', *(f'model.data_preprocessor.{option}' for option in options))
    assert status == 1 and words in capfd.readouterr().err and not (out / 'student.pth').exists()
