_base_ = ['mmseg::vit/vit_deit-b16_mln_upernet_8xb2-160k_ade20k-512x512.py']
load_from = ('https://download.openmmlab.com/mmsegmentation/v0.5/vit/upernet_deit-b16_mln_512x512_160k_ade20k/'
             'upernet_deit-b16_mln_512x512_160k_ade20k_20210621_191949-4e1450f3.pth')
