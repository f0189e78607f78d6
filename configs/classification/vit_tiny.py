# ViT-Ti, the AugReg checkpoint: timm's vit_tiny_patch16_224.augreg_in21k_ft_in1k.
_base_ = ['./_base_/imagenet_224.py']
model = dict(
    type='psaq_mm.Quantized',
    base_type='mmpretrain.TimmClassifier',
    quant={{_base_.quant}},
    model_name='vit_tiny_patch16_224.augreg_in21k_ft_in1k',
    data_preprocessor=dict(num_classes=1000, mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5], to_rgb=True))
load_from = 'https://huggingface.co/timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k/resolve/main/model.safetensors'
