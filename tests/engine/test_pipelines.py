"""Sizes of test pictures, for samples and for export, out of pipelines in any wrapper."""

import pytest
from mmengine.config import Config

from psaq_mm.engine.config import sample_size
from psaq_mm.engine.exporting import default_sizes
from psaq_mm.engine.pipelines import image_sizes
from psaq_mm.errors import ConfigError

LOAD, PACK = dict(type='LoadImageFromFile'), dict(type='PackDetInputs')
KEEPS = dict(type='Resize', scale=(1333, 800), keep_ratio=True)
WIDE = dict(type='Resize', scale=(2048, 1024), keep_ratio=False)
SIX = [(800, 1088), (1088, 800), (800, 1216), (1216, 800), (800, 1344), (1344, 800)]


def dataset(*steps):
    return dict(type='CocoDataset', ann_file='a.json', pipeline=[LOAD, *steps, PACK])


def config(data, **more):
    return Config(dict(model=dict(data_preprocessor=more), test_dataloader=dict(dataset=data)))


WRAPPED = dict(
    plain=dataset(KEEPS),
    concatenated=dict(type='ConcatDataset', datasets=[dataset(KEEPS), dataset(KEEPS)]),
    several=[dataset(KEEPS)],
    repeated=dict(type='RepeatDataset', times=2, dataset=dataset(KEEPS)),
    balanced=dict(
        type='ClassBalancedDataset', oversample_thr=0.1, dataset=dict(type='ConcatDataset', datasets=[dataset(KEEPS)])
    ),
    outer_pipeline=dict(type='MultiImageMixDataset', dataset=dataset(), pipeline=[KEEPS]),
)


@pytest.mark.parametrize('wrapper', list(WRAPPED))
def test_wrapped_data_sets_have_the_sizes_of_what_they_wrap(wrapper):
    assert default_sizes(config(WRAPPED[wrapper])) == SIX
    assert sample_size(config(WRAPPED[wrapper])) == (800, 1216)


def test_every_data_set_has_its_sizes():
    both = config(dict(type='ConcatDataset', datasets=[dataset(WIDE), dataset(KEEPS)]))
    assert default_sizes(both) == [(1024, 2048), *SIX] and sample_size(both) == (800, 1216)


@pytest.mark.parametrize(
    'steps, size',
    [
        ([WIDE], (1024, 2048)),
        ([dict(type='Resize', scale=(2048, 1024))], (1024, 2048)),  # the ratio is not kept by default
        ([dict(type='mmdet.FixShapeResize', width=500, height=300)], (300, 500)),
        ([dict(type='Resize', scale=384)], (384, 384)),
        ([KEEPS, dict(type='CenterCrop', crop_size=(640, 480))], (480, 640)),
        ([KEEPS, dict(type='Pad', size=(1333, 800))], (800, 1333)),
        ([KEEPS, dict(type='Pad', pad_to_square=True)], (1333, 1333)),
        ([dict(type='Compose', transforms=[WIDE])], (1024, 2048)),
    ],
)
def test_a_size_that_all_pictures_have_is_exported_as_it_is(steps, size):
    assert default_sizes(config(dataset(*steps))) == [size] == [sample_size(config(dataset(*steps)))]


def test_what_the_preprocessor_pads_to_is_exported():
    assert default_sizes(config(dataset(dict(type='Resize', scale=(500, 300))), pad_size_divisor=32)) == [(320, 512)]
    assert default_sizes(config(dataset(dict(type='Resize', scale=(500, 300))), test_cfg=dict(size_divisor=8))) == [
        (304, 504)
    ]
    # An upright picture of 800 x 1200 comes as 896 x 1280.
    assert default_sizes(config(dataset(KEEPS), pad_size_divisor=128))[:2] == [(896, 1280), (1280, 896)]


def test_alternatives_and_random_sizes():
    scales = [(1333, 400), (1333, 800)]
    several = [dict(type='Resize', scale=s, keep_ratio=True) for s in scales]
    for steps in (
        [dict(type='TestTimeAug', transforms=[several, [dict(type='RandomFlip', prob=1.0)], [PACK]])],
        [dict(type='RandomChoice', transforms=[[one] for one in several])],
        [dict(type='RandomChoiceResize', scales=scales, keep_ratio=True)],
    ):
        assert image_sizes(config(dataset(*steps))) == [(400, 1333, True), (800, 1333, True)]
        assert set(SIX) < set(default_sizes(config(dataset(*steps))))
    drawn = dict(type='RandomResize', scale=(1000, 500), ratio_range=(0.5, 2.0), keep_ratio=True)
    assert image_sizes(config(dataset(drawn))) == [(1000, 2000, True)]
    short = dict(type='ResizeShortestEdge', scale=512, max_size=2048)
    assert image_sizes(config(dataset(short))) == [(512, 2048, True)]


def test_types_may_be_classes_and_other_steps_are_passed_over():

    class Resize:
        pass

    assert image_sizes(config(dataset(dict(KEEPS, type=Resize), dict(type='Resize', scale_factor=2.0)))) == [
        (800, 1333, True)
    ]


def test_a_segmentor_that_slides_sees_its_crop():
    slides = config(dataset(KEEPS))
    slides.model.test_cfg = dict(mode='slide', crop_size=(480, 640), stride=(320, 320))
    assert default_sizes(slides) == [(480, 640)]


def test_a_config_without_a_size_asks_for_the_option_of_the_command():
    with pytest.raises(ConfigError, match='tells no image size to export for: give --size H W'):
        default_sizes(config(dataset()))
    with pytest.raises(ConfigError, match='set dfq.size'):
        sample_size(config(dataset()))
