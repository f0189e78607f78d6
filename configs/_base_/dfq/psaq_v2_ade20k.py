# PSAQ-ViT V2 at ADE20K's training crop.
dfq = dict(preset='psaq_v2', size=(512, 512), batch_size=4, calibration_samples=16, pool_size=64, evolve_every=50,
           evolve_samples=8, iters=400, generator=dict(batch_size=4, steps=50))
