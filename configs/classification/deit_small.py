# DeiT-S, the checkpoint of the PSAQ-ViT and RepQ-ViT papers (79.8 top-1): timm's deit_small_patch16_224.fb_in1k.
_base_ = ['./_base_/imagenet_224.py']
model = dict(
    type='psaq_mm.Quantized',
    base_type='mmpretrain.TimmClassifier',
    quant={{_base_.quant}},
    model_name='deit_small_patch16_224.fb_in1k',
    data_preprocessor=dict(num_classes=1000, mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True))
load_from = 'https://huggingface.co/timm/deit_small_patch16_224.fb_in1k/resolve/main/model.safetensors'
