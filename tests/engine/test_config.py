"""Configs in each form that MMEngine reads, and what becomes of them."""
import pytest
from mmengine.config import ConfigDict
from mmengine.config.lazy import LazyAttr, LazyObject

from psaq_mm.engine.config import drop_pretrained, is_quantized_config, type_name
from psaq_mm.engine.samples import build_source
from psaq_mm.models.quantized import Quantized
from psaq_mm.synthesis import DeadLeaves, source_of

pytestmark = pytest.mark.filterwarnings('ignore')


class Resize:
    """Stands for any class that a pure-Python config imports."""


@pytest.mark.parametrize('given, name', [
    (None, ''), ('', ''), ({}, ''), ([dict(type='Resize')], ''), ('Resize', 'Resize'), ('mmdet.Resize', 'Resize'),
    (Resize, 'Resize'), (dict(type=Resize), 'Resize'), (ConfigDict(type='mmcv.transforms.Resize'), 'Resize'), (Quantized, 'Quantized'),
    (LazyObject('mmcv.transforms', 'Resize'), 'Resize'), (LazyAttr('Resize', LazyObject('mmcv.transforms')), 'Resize'),
])
def test_the_name_of_a_type_in_each_form(given, name):
    assert type_name(given) == name


def test_types_that_are_classes_are_known_for_what_they_are():
    from mmengine.model import PretrainedInit
    assert is_quantized_config(dict(type=Quantized)) and not is_quantized_config(dict(type=Resize))
    model = dict(type=Resize, backbone=dict(init_cfg=dict(type=PretrainedInit, checkpoint='weights.pth')))
    drop_pretrained(model)
    assert model['backbone']['init_cfg'] is None
    assert type(source_of(dict(type=DeadLeaves))) is DeadLeaves
    assert type(build_source([dict(type=DeadLeaves, color_blur=5), dict(type='PinkNoise')]).sources[0]) is DeadLeaves
