# Data-free settings of the demo: both models at both bit widths within eight minutes on two CPU cores.
dfq = dict(
    batch_size=8,
    calibration_samples=16,
    pool_size=64,
    evolve_every=30,
    evolve_samples=8,
    iters=80,
    generator=dict(batch_size=8, steps=20, init='pink'),
    checkpoint_interval=0,
    sheet_interval=40)
