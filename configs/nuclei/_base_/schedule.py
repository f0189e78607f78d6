# The demo's schedule, in fewer and longer steps.
_base_ = ['../../demo/_base_/schedule.py']
max_iters = 4000
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=150),
    dict(type='CosineAnnealingLR', eta_min=0., by_epoch=False, begin=150, end=max_iters)
]
