_base_ = ['mmdet::swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py']
load_from = 'checkpoints/retinanet_swin_t.pth'  # your own: mmdet has the config alone
