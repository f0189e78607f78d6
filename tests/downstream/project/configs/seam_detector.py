# The project's detector with a backbone of the project.
_base_ = ['./weld_detector.py']
custom_imports = dict(imports=['welds', 'welds.seam_net'])
model = dict(
    backbone=dict(_delete_=True, type='SeamNet'),
    neck=dict(in_channels=[16, 32], num_outs=2),
    rpn_head=dict(anchor_generator=dict(strides=[8, 16])),
    roi_head=dict(bbox_roi_extractor=dict(featmap_strides=[8, 16])))
