"""Tiny models with queries out of the libraries' own zoo configs, with a Swin backbone; in full precision."""

import copy

import torch
from head_models import lively
from quick_builds import metafiles_read_once

SIZE = (64, 96)
SWIN = dict(type='SwinTransformer', embed_dims=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8], window_size=7)
WIDTH, QUERIES = 32, 6

# What each config changes beside its sizes, which `shrunk` does.
CONFIGS = dict(
    detr=('mmdet::detr/detr_r50_8xb2-150e_coco.py', dict()),
    conditional_detr=('mmdet::conditional_detr/conditional-detr_r50_8xb2-50e_coco.py', dict()),
    dab_detr=('mmdet::dab_detr/dab-detr_r50_8xb2-50e_coco.py', dict()),
    deformable_detr=('mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py', dict()),
    two_stage_detr=('mmdet::deformable_detr/deformable-detr-refine-twostage_r50_16xb2-50e_coco.py', dict()),
    dino=('mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py', dict()),
    ddq=('mmdet::ddq/ddq-detr-4scale_r50_8xb2-12e_coco.py', dict()),
    grounding_dino=(
        'mmdet::grounding_dino/grounding_dino_swin-t_pretrain_obj365_goldg_cap4m.py',
        dict(language_model=dict(_delete_=True, type='WordModel')),
    ),
    mask2former=('mmdet::mask2former/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco-panoptic.py', dict()),
    maskformer=('mmdet::maskformer/maskformer_r50_ms-16xb1-75e_coco.py', dict()),
    mmseg_mask2former=('mmseg::mask2former/mask2former_swin-t_8xb2-160k_ade20k-512x512.py', dict()),
    mmseg_maskformer=('mmseg::maskformer/maskformer_swin-t_upernet_8xb2-160k_ade20k-512x512.py', dict()),
)
# They encode positions in 256 channels, whatever the config says.
_FIXED = ('conditional_detr', 'two_stage_detr', 'dino', 'grounding_dino')


def library_of(name):
    return CONFIGS[name][0].partition(':')[0]


def shrunk(value, width):
    """A config's model with ``width`` in place of 256 channels, two layers and a few queries."""
    sizes = dict(
        feedforward_channels=64, num_feats=width // 2, num_layers=2, num_queries=QUERIES, num_groups=4, max_per_img=5
    )
    sizes.update(dict.fromkeys(('embed_dims', 'feat_channels', 'out_channels', 'v_dim', 'l_dim', 'embed_dim'), width))
    if isinstance(value, dict):
        for key, old in value.items():
            value[key] = sizes[key] if key in sizes and isinstance(old, int) else shrunk(old, width)
    elif isinstance(value, list):
        value[:] = [shrunk(one, width) for one in value]
    return value


def config_of(name):
    """The model's config."""
    from mmengine.config import Config

    path, changes = CONFIGS[name]
    with metafiles_read_once():
        config = Config.fromstring(f'_base_ = ["{path}"]\nmodel = {changes!r}\n', '.py')
    model = config.model
    levels = model.backbone.get('out_indices', (0, 1, 2, 3))
    shrunk(model, 256 if name in _FIXED else WIDTH)
    model.backbone = dict(SWIN, out_indices=levels)
    channels = [16 * 2**level for level in levels]
    if 'neck' in model:
        model.neck.in_channels = channels
    for head in ('panoptic_head', 'decode_head'):
        if head in model:
            model[head].in_channels = channels
    if 'bbox_head' in model:
        model.bbox_head.embed_dims = 256 if name in _FIXED else WIDTH
    if 'panoptic_head' in model:  # random weights are sure of nothing
        model.test_cfg.update(object_mask_thr=0.0, iou_thr=0.0, instance_on=True)
        model.data_preprocessor.pop('batch_augments', None)
    return config


def register_word_model():
    """A language model that needs no download, of the form that mmdet's detectors ask for."""
    from mmdet.registry import MODELS
    from mmengine.model import BaseModel
    from torch import nn

    if 'WordModel' in MODELS:
        return

    class Words(dict):
        """Indices of words, as a tokenizer gives them: word by word, a dot after each."""

        def __init__(self, captions):
            pieces = [caption.replace('.', ' . ').split() for caption in captions]
            super().__init__(input_ids=torch.tensor([[sum(map(ord, word)) % 97 for word in row] for row in pieces]))
            self.input_ids, self.places = self['input_ids'], []
            for row, caption in zip(pieces, captions):
                begin, places = 0, []
                for word in row:
                    begin = caption.index(word, begin)
                    places.append((begin, begin + len(word)))
                    begin += len(word)
                self.places.append(places)

        def char_to_token(self, place):
            return next((i for i, (begin, end) in enumerate(self.places[0]) if begin <= place < end), None)

    @MODELS.register_module()
    class WordModel(BaseModel):
        pad_to_max, max_tokens = False, 256

        def __init__(self, **kwargs):
            super().__init__()
            body = nn.Embedding(97, 24)
            body.language_dim, body.mix = 24, nn.Linear(24, 24)
            self.language_backbone = nn.Sequential()
            self.language_backbone.add_module('body', body)

        def tokenizer(self, captions, **kwargs):
            return Words(captions)

        def forward(self, captions, **kwargs):
            words = Words(captions).input_ids
            seen = torch.ones_like(words, dtype=torch.bool)
            body = self.language_backbone.body
            same = torch.eye(words.shape[1], dtype=torch.bool).expand(len(words), -1, -1)
            places = torch.arange(words.shape[1]).expand(len(words), -1)
            return dict(embedded=body.mix(body(words)), masks=same, position_ids=places, text_token_mask=seen)


def build(name, seed=0):
    """A full-precision model in evaluation mode, with weights that are alive."""
    from mmengine.registry import MODELS, init_default_scope

    init_default_scope(library_of(name))
    if name == 'grounding_dino':
        register_word_model()
    torch.manual_seed(seed)
    model = MODELS.build(copy.deepcopy(config_of(name).model))
    if hasattr(model, 'level_embed') and isinstance(model.level_embed, torch.nn.Parameter):
        torch.nn.init.normal_(model.level_embed)  # left as memory was
    return lively(model, seed)


def samples(name, count, shapes=None):
    """Data samples of the library, which fill their batch unless ``shapes`` says how much of it they fill."""
    if library_of(name) == 'mmdet':
        from mmdet.structures import DetDataSample as Sample
    else:
        from mmseg.structures import SegDataSample as Sample
    made = []
    for number in range(count):
        shape = SIZE if shapes is None else shapes[number]
        sample = Sample(metainfo=dict(img_shape=shape, ori_shape=shape, pad_shape=SIZE, batch_input_shape=SIZE))
        sample.set_metainfo(dict(scale_factor=(1.0, 1.0)))
        if name == 'grounding_dino':
            sample.set_metainfo(dict(text=('cat', 'big dog'), custom_entities=True))
        made.append(sample)
    return made


def predicted(model, name, images, shapes=None):
    """All numbers that a model predicts, in a list of tensors."""
    with torch.no_grad():
        out = model.predict(images, samples(name, len(images), shapes))
    tensors = []
    for sample in out:
        for field in ('pred_instances', 'pred_panoptic_seg', 'seg_logits'):
            if field in sample:
                tensors += [v for _, v in sorted(getattr(sample, field).items()) if isinstance(v, torch.Tensor)]
    return tensors


def pictures(count=2, seed=1):
    return torch.randn(count, 3, *SIZE, generator=torch.Generator().manual_seed(seed))
