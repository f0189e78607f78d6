"""Configs are tried at reduced size with the structure that they have, and what is not quantized is told."""

import copy
import json

import pytest
import torch

from benchmarks import every_config, shrinking

pytestmark = pytest.mark.filterwarnings('ignore')


def read(library, pattern):
    pytest.importorskip(library)
    ((name, model),) = every_config.configs_of(library, pattern)
    return model


def test_a_detector_keeps_its_structure_and_loses_its_size():
    model = read('mmdet', 'mask2former_swin-l-p4-w12-384-in21k_16xb1')
    built = every_config.build_small('mmdet', copy.deepcopy(model))
    swin, head = built.model.backbone, built.model.panoptic_head
    assert built.alone is None and built.images.shape == (1, 3, 64, 128)
    assert [len(stage.blocks) for stage in swin.stages] == [2, 1, 1, 1] and swin.stages[0].blocks[
        0
    ].norm1.bias.shape == (32,)
    attention = swin.stages[0].blocks[1].attn
    assert attention.w_msa.window_size == (12, 12) and attention.shift_size == 6
    assert len(head.transformer_decoder.layers) == 1 and head.query_embed.num_embeddings == 10
    assert head.pixel_decoder.input_convs[0].conv.in_channels == 256  # it follows the backbone


def test_a_stack_of_layers_keeps_one_for_each_output():
    model = read('mmseg', 'vit_deit-s16-ln_mln_upernet')
    vit = every_config.build_small('mmseg', model).model.backbone
    assert len(vit.layers) == 4 and vit.out_indices == [0, 1, 2, 3] and vit.cls_token.shape[-1] == 3 * 64


def test_a_table_of_architectures_is_what_it_was_afterwards():
    model = read('mmpretrain', 'levit/levit-384_8xb256_in1k')
    from mmpretrain.models import LeViT

    before = copy.deepcopy(LeViT.arch_zoo)
    levit = every_config.build_small('mmpretrain', model).model.backbone
    assert before == LeViT.arch_zoo and len(levit.stages[0]) < 2 * before['384']['depths'][0]


def test_weights_that_would_be_downloaded_are_not():
    pytest.importorskip('mmpretrain')
    from mmengine.runner.checkpoint import CheckpointLoader

    with shrinking.no_downloads(), pytest.raises(RuntimeError, match='needs a download: https://x'):
        CheckpointLoader.load_checkpoint('https://x/y.pth')
    model = read('mmpretrain', 'milan_vit-base')
    assert shrinking.tower_path(model) == ('backbone',) and model['target_generator']
    assert every_config.build_small('mmpretrain', model).model.target_generator is None


def test_the_full_scope_of_a_model_of_pretraining_is_refused():
    built = every_config.build_small('mmpretrain', read('mmpretrain', 'mae_hivit-base-p16_8xb512-amp-coslr-400e'))
    outcome = every_config._outcome(lambda: every_config.quantize_all(built))
    assert outcome['result'] == 'refused' and 'restore masked pictures' in outcome['reason']


def test_rows_and_tables(tmp_path, capsys):
    pytest.importorskip('mmseg')
    path = tmp_path / 'rows.json'
    arguments = ['--library', 'mmseg', '--filter', 'segmenter_vit-t', '--json', str(path)]
    assert every_config.main(arguments) == 0
    (row,) = json.loads(path.read_text())
    assert row['backbone'] == 'VisionTransformer' and row['backbone_scope']['result'] == 'quantized'
    assert 0 < row['backbone_scope']['error'] < 0.1
    refused = dict(row, config='other.py', backbone_scope=dict(result='refused', reason='a | reason'))
    unread = dict(library='mmseg', config='broken.py', backbone=None, unread='KeyError: x')
    path.write_text(json.dumps([row, refused, unread]))
    assert every_config.main(['--merge', str(path)]) == 0
    printed = capsys.readouterr().out
    assert "`scope='backbone'`, 2 configs: 1 quantized, 1 refused; not quantized 50.0 %" in printed
    assert '1 configs of mmseg cannot be read: KeyError' in printed and 'a | reason' in printed


def test_an_error_of_the_package_is_a_refusal_and_any_other_a_defect():
    from psaq_mm.errors import UnsupportedModelError

    def refuse():
        raise UnsupportedModelError('the backbone X is not supported: use one of A, B')

    assert every_config._outcome(refuse) == dict(result='refused', reason='the backbone X is not supported')
    assert every_config._outcome(lambda: torch.zeros(2) @ torch.zeros(3))['result'] == 'failed'


@pytest.mark.parametrize(
    'backbone, counts', [('ResNet', False), ('SwinTransformer', True), ('Vig', False), ('PoolFormer', True)]
)
def test_what_counts(backbone, counts):
    assert every_config.counts(dict(type='ImageClassifier', backbone=dict(type=f'mmpretrain.{backbone}'))) == counts
