"""Pictures are prepared as the libraries' own test pipelines and data preprocessors do it, to the last bit."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from psaq_mm.engine.pipelines import pipeline_steps
from psaq_mm.errors import ConfigError, DataError
from psaq_mm.runtime.preparation import Preparation

ROOT = Path(__file__).resolve().parents[2]
MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
LOAD = dict(type='LoadImageFromFile')
SHAPES = ((37, 53), (3, 700), (640, 5), (1, 1), (97, 64))
"""Of pictures: odd, very wide, very tall, one pixel."""


def library(name):
    """A library with its transforms and data preprocessors registered."""
    module = pytest.importorskip(name)
    from mmengine.registry import init_default_scope

    if name == 'mmseg':
        pytest.importorskip('mmseg.apis')
    init_default_scope(name)
    __import__(f'{name}.datasets.transforms')
    __import__(f'{name}.models')
    return module


def picture_file(folder, shape, seed=0):
    """A picture of noise in a file without loss."""
    import cv2

    path = folder / f'{shape[0]}x{shape[1]}.png'
    cv2.imwrite(str(path), np.random.default_rng(seed).integers(0, 256, (*shape, 3)).astype(np.uint8))
    return path


def both(config, path):
    """The input of the library's model and data sample, and ours."""
    from mmengine.dataset import Compose
    from mmengine.registry import MODELS

    packed = Compose(config['test_pipeline'])(dict(img_path=str(path)))
    with torch.no_grad():
        wanted = MODELS.build(config['model']['data_preprocessor'])(
            dict(inputs=[packed['inputs']], data_samples=[packed['data_samples']])
        )
    steps = pipeline_steps(config)
    assert steps.unknown == ''
    settings = config['model']['data_preprocessor']
    manifest = dict(
        channels=3,
        mean=settings.get('mean'),
        std=settings.get('std'),
        reverse_channels=bool(settings.get('bgr_to_rgb') or settings.get('to_rgb')),
        pipeline=steps.pipeline,
        pad_divisor=steps.pad_divisor,
    )
    return wanted['inputs'][0].numpy(), packed['data_samples'], Preparation(manifest)(path)


def same(wanted, sample, prepared):
    assert wanted.shape == prepared.image.shape and np.array_equal(wanted, prepared.image)
    assert prepared.info.original == tuple(sample.ori_shape)
    assert prepared.info.shape == tuple(sample.img_shape[:2])
    assert prepared.info.scale == tuple(sample.metainfo.get('scale_factor', (1.0, 1.0)))


DETECTORS = {
    'keep-ratio': [dict(type='Resize', scale=(133, 80), keep_ratio=True)],
    'fixed': [dict(type='mmdet.Resize', scale=(64, 48), keep_ratio=False)],
    'rounded-down': [dict(type='FixScaleResize', scale=(133, 80), keep_ratio=True)],
    'shape': [dict(type='FixShapeResize', width=70, height=50)],
    'factor': [dict(type='Resize', scale_factor=1.7, keep_ratio=True)],
    'square': [
        dict(type='Resize', scale=(300, 300), keep_ratio=True),
        dict(type='Pad', pad_to_square=True, pad_val=dict(img=(114, 110, 100))),
    ],
    'pad': [dict(type='Resize', scale=(300, 300), keep_ratio=True), dict(type='Pad', size_divisor=24)],
}


@pytest.mark.parametrize('name', DETECTORS)
def test_detectors(name, tmp_path):
    library('mmdet')
    keys = ('ori_shape', 'img_shape', 'scale_factor')
    pipeline = [LOAD, *DETECTORS[name], dict(type='PackDetInputs', meta_keys=keys)]
    preprocessor = dict(type='DetDataPreprocessor', mean=MEAN, std=STD, bgr_to_rgb=True, pad_size_divisor=32)
    config = dict(test_pipeline=pipeline, model=dict(data_preprocessor=preprocessor))
    # Of a picture of one row mmdet's own resizing leaves no row with these.
    shapes = [s for s in SHAPES if min(s) > 5] if name == 'rounded-down' else SHAPES
    for shape in shapes:
        same(*both(config, picture_file(tmp_path, shape)))


SEGMENTORS = {
    'keep-ratio': ([dict(type='Resize', scale=(204, 51), keep_ratio=True)], None),
    'padded': ([dict(type='Resize', scale=(204, 51), keep_ratio=True)], dict(size_divisor=32)),
    'shortest': ([dict(type='ResizeShortestEdge', scale=40, max_size=120)], None),
    'multiple': ([dict(type='ResizeToMultiple', size_divisor=32)], None),
    'float': ([dict(type='Resize', scale=(90, 60))], dict(size_divisor=16)),
}


@pytest.mark.parametrize('name', SEGMENTORS)
def test_segmentors(name, tmp_path):
    library('mmseg')
    steps, test_cfg = SEGMENTORS[name]
    load = dict(LOAD, to_float32=True) if name == 'float' else LOAD
    preprocessor = dict(type='SegDataPreProcessor', mean=MEAN, std=STD, bgr_to_rgb=True, test_cfg=test_cfg)
    keys = ('ori_shape', 'img_shape', *(() if name == 'multiple' else ('scale_factor',)))
    pipeline = [load, *steps, dict(type='PackSegInputs', meta_keys=keys)]
    config = dict(test_pipeline=pipeline, model=dict(data_preprocessor=preprocessor))
    for shape in SHAPES:
        same(*both(config, picture_file(tmp_path, shape)))


CLASSIFIERS = {
    'edge': [dict(type='ResizeEdge', scale=36, edge='short'), dict(type='CenterCrop', crop_size=32)],
    'pillow': [
        dict(type='ResizeEdge', scale=36, edge='short', backend='pillow', interpolation='bicubic'),
        dict(type='CenterCrop', crop_size=(32, 24)),
    ],
    'long': [dict(type='ResizeEdge', scale=700, edge='long', interpolation='area')],
    'resize': [dict(type='Resize', scale=(40, 32), interpolation='lanczos'), dict(type='CenterCrop', crop_size=64)],
    'efficientnet': [dict(type='EfficientNetCenterCrop', crop_size=48)],
}


@pytest.mark.parametrize('name', CLASSIFIERS)
def test_classifiers(name, tmp_path):
    library('mmpretrain')
    preprocessor = dict(type='ClsDataPreprocessor', mean=MEAN, std=STD, to_rgb=True)
    pipeline = [LOAD, *CLASSIFIERS[name], dict(type='PackInputs', meta_keys=('ori_shape', 'img_shape'))]
    config = dict(test_pipeline=pipeline, model=dict(data_preprocessor=preprocessor))
    for shape in SHAPES:
        if name == 'long' and min(shape) < 6:
            continue  # mmpretrain's own resizing leaves no row
        wanted, sample, prepared = both(config, picture_file(tmp_path, shape))
        assert wanted.shape == prepared.image.shape and np.array_equal(wanted, prepared.image)
        assert prepared.info.original == tuple(sample.ori_shape)


# ---------------------------------------------------------------------- steps of a config
@pytest.mark.parametrize(
    'steps, told',
    [
        ([dict(type='Resize', scale=(9, 9)), dict(type='MyOwn')], 'MyOwn'),
        ([dict(type='torchvision/Resize', size=9)], 'torchvision/Resize'),
        ([dict(type='elsewhere.Resize', scale=(9, 9))], 'elsewhere.Resize'),
        ([dict(type='Normalize', mean=MEAN, std=STD), dict(type='Resize', scale=(9, 9))], 'Normalize before the size'),
        ([dict(type='Resize', scale=(9, 9), backend='tifffile')], "Resize with interpolation='bilinear' with backend"),
        ([dict(type='ResizeEdge', scale='many')], 'ResizeEdge as it stands there'),
        ([dict(type='RandomFlip', prob=0.5)], 'RandomFlip'),
        ([dict(type='CenterCrop', crop_size=9, auto_pad=True)], 'CenterCrop with auto_pad=True'),
        ([], 'no test pipeline'),
    ],
)
def test_what_has_no_form_in_an_export_is_told(steps, told):
    found = pipeline_steps(dict(test_pipeline=steps))
    assert found.pipeline is None and found.unknown.startswith(told)


def test_the_pipeline_is_that_of_the_test_set():
    pipeline = [LOAD, dict(type='Resize', scale=(20, 10)), dict(type='RandomFlip', prob=0), dict(type='PackInputs')]
    leaf, other = dict(type='CocoDataset', pipeline=pipeline), dict(type='CocoDataset', pipeline=pipeline[:1])
    resize = dict(type='resize', scale=[20, 10], keep_ratio=False, interpolation='bilinear', backend='cv2')
    outer = dict(type='RepeatDataset', dataset=other, pipeline=pipeline[1:])
    for dataset in (leaf, outer, dict(type='ConcatDataset', datasets=[leaf, leaf])):
        config = dict(test_pipeline=[dict(type='No')], test_dataloader=dict(dataset=dataset))
        assert pipeline_steps(config).pipeline == [resize]
    two = dict(test_dataloader=dict(dataset=dict(type='ConcatDataset', datasets=[leaf, other])))
    assert pipeline_steps(two).unknown.startswith('several test sets')


def test_padding_and_windows_are_read():
    model = dict(
        data_preprocessor=dict(pad_size_divisor=32), test_cfg=dict(mode='slide', crop_size=(64, 48), stride=(40, 30))
    )
    found = pipeline_steps(dict(test_pipeline=[LOAD], model=model))
    assert found.pipeline == [] and found.pad_divisor == 32
    assert found.slide == dict(crop_size=[64, 48], stride=[40, 30])
    model = dict(data_preprocessor=dict(test_cfg=dict(size=(64, 64))), test_cfg=dict(mode='whole'))
    found = pipeline_steps(dict(test_pipeline=[LOAD], model=model))
    assert found.unknown == 'data_preprocessor.test_cfg.size' and found.slide is None


# ---------------------------------------------------------------------- bad pictures
PLAIN = dict(channels=3, mean=[1, 2, 3], std=[1, 1, 2], reverse_channels=True)


@pytest.mark.parametrize(
    'picture, told',
    [
        (np.zeros((4, 5), np.uint8), r'shape \(4, 5\) is grey .* cv2.cvtColor'),
        (np.zeros((4, 5, 1), np.uint8), r'\(4, 5, 1\) are no pictures of 3 channels'),
        (np.zeros((4, 5, 4), np.uint8), r'picture\[..., :3\] without its transparency'),
        (np.zeros((0, 5, 3), np.uint8), 'has no pixels'),
        (np.full((4, 5, 3), 0.5), r'from 0.5 to 0.5: give values from 0 to 255, such as picture \* 255'),
        (np.full((4, 5, 3), -2.0), 'from -2 to -2: give it as it was read'),
        (np.full((4, 5, 3), np.nan), 'not finite'),
        (np.full((4, 5, 3), 999, np.uint16), 'values from 999 to 999'),
        (np.zeros((4, 5, 3), bool), 'a picture of bool'),
        ('nowhere.png', 'there is no picture nowhere.png'),
    ],
)
def test_what_is_no_picture_is_refused(picture, told):
    with pytest.raises(DataError, match=told):
        Preparation(PLAIN)(picture)


def test_a_file_that_is_no_picture_is_refused(tmp_path):
    pytest.importorskip('cv2')
    whole = picture_file(tmp_path, (40, 50)).read_bytes()
    for name, content in (('text.jpg', b'hello'), ('empty.png', b''), ('short.png', whole[:60])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f'{name} is no picture that OpenCV reads'):
            Preparation(PLAIN)(tmp_path / name)


def test_a_picture_that_has_no_pixels_in_the_models_size_is_refused():
    pytest.importorskip('cv2')
    manifest = dict(PLAIN, pipeline=[dict(type='resize', scale=[133, 80], keep_ratio=True)])
    with pytest.raises(DataError, match='a picture of 1 x 900 would have no pixels in the size 0 x 133'):
        Preparation(manifest)(np.zeros((1, 900, 3), np.uint8))


def test_whole_numbers_of_another_type_are_pictures_too():
    picture = np.random.default_rng(0).integers(0, 256, (4, 5, 3))
    wanted = Preparation(PLAIN)(picture.astype(np.uint8)).image
    assert np.array_equal(Preparation(PLAIN)(picture).image, wanted)
    assert np.array_equal(Preparation(PLAIN)(picture.astype(np.float64)).image, wanted)
    assert np.array_equal(wanted[0], (picture[..., 2].astype(np.float32) - 1) / 1)


def test_a_step_of_a_later_version_is_refused():
    with pytest.raises(ConfigError, match="a step 'warp', which this psaq_mm does not know"):
        Preparation(dict(PLAIN, pipeline=[dict(type='warp')]))


def test_without_opencv_the_way_out_is_named():
    script = """
import sys
sys.modules['cv2'] = None
import numpy as np
from psaq_mm.runtime.preparation import Preparation
plain = dict(channels=3, mean=None, std=None, reverse_channels=False)
Preparation(plain)(np.zeros((4, 5, 3), np.uint8))  # nothing to resize
try:
    Preparation(dict(plain, pipeline=[dict(type='resize', scale=[4, 4])]))(np.zeros((4, 5, 3), np.uint8))
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.startswith('ConfigError') and 'pip install opencv-python-headless' in done.stdout, done.stderr
