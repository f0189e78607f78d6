_base_ = ['mmseg::vit/vit_vit-b16-ln_mln_upernet_8xb2-160k_ade20k-512x512.py']
load_from = ('https://download.openmmlab.com/mmsegmentation/v0.5/vit/upernet_vit-b16_ln_mln_512x512_160k_ade20k/'
             'upernet_vit-b16_ln_mln_512x512_160k_ade20k_20210621_172828-f444c077.pth')
