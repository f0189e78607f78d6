"""A tiny classifier with pictures to train and to test on, as a user's folder."""

from pathlib import Path

import numpy as np
import torch
from tiny import Project

CLASSIFIER = """
default_scope = 'mmpretrain'
data_preprocessor = dict(num_classes=3, mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='SwinTransformer', arch=dict(embed_dims=16, depths=[2, 1], num_heads=[1, 2]), img_size=32, window_size=4,
        out_indices=(1, ), drop_path_rate=0.),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=3, in_channels=32, loss=dict(type='CrossEntropyLoss')))
pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
train_dataloader = dict(
    batch_size=2, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='CustomDataset', data_root={data!r}, data_prefix='train', pipeline=pipeline))
test_dataloader = dict(
    batch_size=8, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='CustomDataset', data_root={data!r}, data_prefix='test', pipeline=pipeline))
test_evaluator = dict(type='Accuracy', topk=(1, ))
test_cfg = dict()
"""


def write_pictures(folder: Path, per_class: int, seed: int) -> None:
    """Folders ``a``, ``b`` and ``c`` of 32 x 32 pictures: blocks of colour and noise."""
    from PIL import Image

    random = np.random.default_rng(seed)
    for name in 'abc':
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            blocks = random.integers(0, 256, (4, 4, 3)).repeat(8, 0).repeat(8, 1)
            noisy = np.clip(blocks + random.normal(0, 20, blocks.shape), 0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(folder / name / f'{number}.png')


class ClassifierProject(Project):
    """A classifier of random weights whose bias is such that each class wins on some of the test pictures."""

    def __init__(self, folder: Path, per_class: int = 8):
        write_pictures(folder / 'data' / 'train', 2, seed=1)
        write_pictures(folder / 'data' / 'test', per_class, seed=2)
        super().__init__(folder, CLASSIFIER.replace('{data!r}', repr(str(folder / 'data'))))
        content = torch.load(self.checkpoint)
        content['state_dict'].update(self._spread_head(content['state_dict']))
        torch.save(content, self.checkpoint)

    def _spread_head(self, weights):
        from mmengine.config import Config
        from PIL import Image

        from psaq_mm.engine.building import build_model

        config = Config.fromfile(self.base)
        model = build_model(config, dict(config.model, data_preprocessor=config.data_preprocessor)).eval()
        model.load_state_dict(weights)
        pictures = [np.asarray(Image.open(p))[..., ::-1].copy() for p in sorted(self.folder.glob('data/test/*/*.png'))]
        batch = torch.stack([torch.from_numpy(p).permute(2, 0, 1) for p in pictures])
        with torch.no_grad():
            logits = model.head(model.extract_feat(model.data_preprocessor(dict(inputs=batch))['inputs']))
        scale = 1 / logits.std(0)
        return {
            'head.fc.weight': weights['head.fc.weight'] * scale[:, None],
            'head.fc.bias': (weights['head.fc.bias'] - logits.mean(0)) * scale,
        }
