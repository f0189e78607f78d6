# PSAQ-ViT V2 at COCO's test resolution, one image a batch: fits a workstation without a large GPU.
dfq = dict(preset='psaq_v2', size=(800, 1216), batch_size=1, calibration_samples=8, pool_size=32, evolve_every=50,
           evolve_samples=4, iters=400, generator=dict(batch_size=1, steps=50))
