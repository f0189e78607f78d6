from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip('mmseg')
from mmengine.config import Config  # noqa: E402
from mmengine.registry import DefaultScope  # noqa: E402
from mmengine.structures import PixelData  # noqa: E402
from mmseg.registry import DATASETS, METRICS, MODELS  # noqa: E402
from mmseg.structures import SegDataSample  # noqa: E402
from mmseg.utils import register_all_modules  # noqa: E402

CONFIG = Path(__file__).parents[2] / 'configs' / 'upernet_swin_camvid.py'
VOID = 11


@pytest.fixture(autouse=True)
def mmseg_scope():
    register_all_modules(init_default_scope=False)
    with DefaultScope.overwrite_default_scope('mmseg'):
        yield


def sample(labels):
    return SegDataSample(
        metainfo=dict(img_shape=tuple(labels.shape), ori_shape=tuple(labels.shape)),
        gt_sem_seg=PixelData(data=labels[None]),
    )


def test_root_of_the_data_comes_from_the_environment(monkeypatch):
    monkeypatch.delenv('PSAQ_MM_DATA', raising=False)
    assert Config.fromfile(CONFIG).data_root == 'data/camvid'
    monkeypatch.setenv('PSAQ_MM_DATA', '/somewhere')
    cfg = Config.fromfile(CONFIG)
    roots = {cfg[f'{split}_dataloader'].dataset.data_root for split in ('train', 'val', 'test')}
    assert roots == {'/somewhere/camvid'}


def test_void_pixels_give_no_loss():
    torch.manual_seed(0)
    cfg = Config.fromfile(CONFIG)
    heads = [MODELS.build(cfg.model[name]).eval() for name in ('decode_head', 'auxiliary_head')]
    labels = torch.randint(0, 11, (8, 8))
    half_void = labels.clone()
    half_void[4:] = VOID
    for head in heads:
        logits = torch.randn(1, 11, 8, 8)
        weight = head.loss_decode.loss_weight
        expected = torch.nn.functional.cross_entropy(logits[:, :, :4], labels[None, :4]) * weight
        loss = head.loss_by_feat(logits, [sample(half_void)])['loss_ce']
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        nothing = head.loss_by_feat(logits, [sample(torch.full((8, 8), VOID))])['loss_ce']
        assert nothing == 0


def test_void_pixels_do_not_count_in_the_metric():
    cfg = Config.fromfile(CONFIG)
    truth = torch.arange(11).repeat(11, 1)
    truth[0] = VOID
    wrong_where_void = truth.clone()
    wrong_where_void[0] = 3
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        metric = METRICS.build(evaluator)
        metric.dataset_meta = dict(classes=cfg.metainfo.classes)
        metric.process({}, [dict(pred_sem_seg=dict(data=wrong_where_void[None]), gt_sem_seg=dict(data=truth[None]))])
        assert metric.evaluate(1)['mIoU'] == 100


@pytest.mark.parametrize('split, count', [('train', 367), ('val', 101), ('test', 233)])
def test_data_sets_hold_the_classes_and_void_only(data_root, monkeypatch, split, count):
    if not (data_root / 'camvid').is_dir():
        pytest.skip(f'{data_root} has no camvid folder')
    monkeypatch.setenv('PSAQ_MM_DATA', str(data_root))
    dataset = DATASETS.build(Config.fromfile(CONFIG)[f'{split}_dataloader'].dataset)
    assert len(dataset) == count and len(dataset.metainfo['classes']) == VOID
    seen = set()
    for index in range(0, count, 40):
        item = dataset[index]
        labels = item['data_samples'].gt_sem_seg.data
        assert (
            tuple(item['inputs'].shape[-2:])
            == tuple(labels.shape[-2:])
            == ((240, 240) if split == 'train' else (360, 480))
        )
        seen |= set(np.unique(labels).tolist())
    assert seen <= set(range(VOID + 1)) and len(seen) > 8
