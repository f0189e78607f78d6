# ImageNet-1k as timm evaluates these checkpoints: shorter side 248, bicubic, centre crop 224.
default_scope = 'mmpretrain'
quant = dict(preset='psaq_v2_w8a8', scope='full')
# V2's samples want dead leaves beside them: alone they cost half a point at W4A8, and RepQ's channel ranges 2.5 at W6A6 (docs/history/results_synthesis.md).
# Rounding is all: training on such samples costs more than it mends (docs/method.md). With dfq.iters=60 gains, offsets and biases are learned, by tokens of
# every third block and by the class probabilities; it is worth that where activations have 4 bits.
dfq = dict(preset='psaq_v2', size=(224, 224), distil=('blocks', ), rounding='auto', logits_weight=1., batch_size=16,
           samples=[dict(type='psaq_mm.Generated', weight=2), dict(type='psaq_mm.DeadLeaves')], generator=dict(batch_size=32, steps=50),
           calibration_samples=96, pool_size=256, evolve_every=100, evolve_samples=32, reobserve=False, iters=0, lr=0., vector_lr=1e-3)

pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='ResizeEdge', scale=248, edge='short', backend='pillow', interpolation='bicubic'),
    dict(type='CenterCrop', crop_size=224),
    dict(type='PackInputs'),
]
# The training set serves only as a control: real images that set ranges, seen as at test time.
train_dataloader = dict(
    batch_size=32,
    num_workers=2,
    dataset=dict(type='ImageNet', data_root='data/imagenet', split='train', pipeline=pipeline),
    sampler=dict(type='DefaultSampler', shuffle=True))
test_dataloader = dict(
    batch_size=64,
    num_workers=2,
    dataset=dict(type='ImageNet', data_root='data/imagenet', split='val', pipeline=pipeline),
    sampler=dict(type='DefaultSampler', shuffle=False))
test_cfg = dict()
test_evaluator = dict(type='Accuracy', topk=(1, 5))
val_dataloader, val_cfg, val_evaluator = test_dataloader, test_cfg, test_evaluator
