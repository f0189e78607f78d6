"""Configs of libraries whose distribution has another name than MMEngine expects."""

import pytest
from mmengine.config.utils import MODULE2PACKAGE

from psaq_mm.engine.forks import find_configs_of_forks


@pytest.fixture
def table():
    before = dict(MODULE2PACKAGE)
    yield MODULE2PACKAGE
    MODULE2PACKAGE.clear()
    MODULE2PACKAGE.update(before)


def test_a_library_without_its_distribution_is_found_by_its_module(table):
    table.update(two_ranks='two-ranks-of-the-original')  # a module that is there, without a distribution
    find_configs_of_forks()
    assert table['two_ranks'] == 'two_ranks'


def test_what_is_installed_or_not_there_at_all_stays(table):
    table.update(_pytest='pytest', no_such_module='no-such-distribution')
    find_configs_of_forks()
    assert table['_pytest'] == 'pytest' and table['no_such_module'] == 'no-such-distribution'


@pytest.mark.parametrize(
    'library, path',
    [
        ('mmdet', '_base_/models/mask-rcnn_r50_fpn.py'),
        ('mmseg', '_base_/models/upernet_swin.py'),
        ('mmpretrain', '_base_/models/swin_transformer/tiny_224.py'),
    ],
)
def test_bases_of_every_library_are_found(library, path, tmp_path):
    """Whichever family is installed."""
    pytest.importorskip(library)
    from psaq_mm.commands.common import load_config

    config = tmp_path / 'config.py'
    config.write_text(f"_base_ = ['{library}::{path}']\n")
    assert load_config(str(config)).model.backbone.type == ('ResNet' if library == 'mmdet' else 'SwinTransformer')
