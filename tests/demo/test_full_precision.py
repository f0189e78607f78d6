import importlib
import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip('mmengine')
from mmengine.config import Config  # noqa: E402

ROOT = Path(__file__).parents[2]
CHECKPOINTS = ROOT / 'demo' / 'checkpoints'
DEMOS = {
    'mask_rcnn_swin_nuclei': ('mmdet', {'coco/bbox_mAP': 0.43, 'coco/segm_mAP': 0.47}),
    'mask_rcnn_swin_demo': ('mmdet', {'coco/bbox_mAP': 0.55, 'coco/segm_mAP': 0.50}),
    'upernet_swin_demo': ('mmseg', {'mIoU': 75.0}),
}
_spec = importlib.util.spec_from_file_location('train_full_precision', ROOT / 'demo' / 'train_full_precision.py')
train_full_precision = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(train_full_precision)


@pytest.fixture(params=sorted(DEMOS))
def name(request):
    return request.param


def config_of(name):
    return ROOT / 'configs' / ('nuclei' if 'nuclei' in name else 'demo') / f'{name}.py'


def load(name):
    # weights only: what needs arbitrary code to be read does not belong in a repository
    return torch.load(CHECKPOINTS / f'{name}.pth', map_location='cpu', weights_only=True)


def test_checkpoint_is_small_and_holds_weights_and_class_names_only(name):
    assert (CHECKPOINTS / f'{name}.pth').stat().st_size <= 10 * 2**20
    checkpoint = load(name)
    assert set(checkpoint) == {'meta', 'state_dict'}
    assert set(checkpoint['meta']) <= set(train_full_precision.META_KEYS)
    classes = Config.fromfile(config_of(name)).metainfo['classes']
    assert tuple(checkpoint['meta']['dataset_meta']['classes']) == classes
    for key, value in checkpoint['state_dict'].items():
        assert value.dtype in (torch.float16, torch.float32, torch.int64), key
        assert torch.isfinite(value.float()).all(), key


def test_checkpoint_and_log_name_no_machine(name):
    text = json.dumps(load(name)['meta'], default=str) + (CHECKPOINTS / f'{name}.log.json').read_text()
    # An absolute path anywhere: a quote, a blank or the start, then two folders.
    assert not re.findall(r"""(?:^|["' =])(/\w[\w.-]*/\w[\w./-]*)""", text)
    assert 'site-packages' not in text


def test_checkpoint_fits_the_model_of_its_config_key_by_key(name):
    library, _ = DEMOS[name]
    pytest.importorskip(library)
    from mmengine.registry import MODELS, DefaultScope

    register_all_modules = importlib.import_module(f'{library}.utils').register_all_modules
    register_all_modules(init_default_scope=False)
    cfg = Config.fromfile(config_of(name))
    with DefaultScope.overwrite_default_scope(library):
        model = MODELS.build(cfg.model)
    model.load_state_dict(load(name)['state_dict'], strict=True)


def test_log_ends_above_the_bar_that_the_demo_needs(name):
    records = json.loads((CHECKPOINTS / f'{name}.log.json').read_text())
    losses = [record['loss'] for record in records if 'loss' in record]
    assert losses[-1] < losses[0] / 2
    for metric, bar in DEMOS[name][1].items():
        assert [record[metric] for record in records if metric in record][-1] >= bar


def test_strip_drops_the_optimizer_and_unknown_meta():
    weights = dict(kernel=torch.ones(2, 2), variance=torch.tensor([1e6], dtype=torch.float64), n=torch.tensor(3))
    stripped = train_full_precision.strip(
        dict(
            state_dict=weights,
            optimizer=dict(state={}),
            message_hub=object(),
            param_schedulers=[],
            meta=dict(iter=7, dataset_meta=dict(classes=('a',)), env_info='somewhere', hook_msgs=dict()),
        )
    )
    assert stripped['meta'] == dict(iter=7, dataset_meta=dict(classes=('a',)))
    kept = stripped['state_dict']
    assert {key: value.dtype for key, value in kept.items()} == dict(
        kernel=torch.float16, variance=torch.float32, n=torch.int64
    )
    assert all(torch.equal(kept[key].double(), weights[key].double()) for key in weights)
