"""Every piece of the detection glue against mmcv and mmdet on the same numbers."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psaq_mm.errors import ConfigError, DataError
from psaq_mm.runtime.detection import DetectorSettings, ImageInfo, detect
from psaq_mm.runtime.detection.arrays import best, sigmoid, softmax
from psaq_mm.runtime.detection.boxes import decode
from psaq_mm.runtime.detection.dense import _above_threshold
from psaq_mm.runtime.detection.masks import paste
from psaq_mm.runtime.detection.priors import level_priors
from psaq_mm.runtime.detection.roi_align import Rois, roi_align, roi_levels
from psaq_mm.runtime.detection.settings import BoxCoding, DenseSettings, Priors, RoiAlignSettings, Suppression
from psaq_mm.runtime.detection.suppression import nms, suppress

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.filterwarnings('ignore')
seeds = st.integers(0, 2**32 - 1)


def tensor(array):
    return torch.from_numpy(np.ascontiguousarray(array))


def random_boxes(rng, count, whole=False, size=60):
    """Boxes that overlap much. Whole numbers give overlaps that are equal to a threshold, and boxes without area."""
    corners = rng.uniform(0, size, (count, 2, 2))
    corners[:, 1] = corners[:, 0] + rng.uniform(0, size / 3, (count, 2))
    boxes = corners.reshape(-1, 4)
    return (np.round(boxes / 4) * 4 if whole else boxes).astype(np.float32)


def distinct_scores(rng, count):
    """The library's sort is not stable: without equal scores there is one right order."""
    return (rng.permutation(count) + 1).astype(np.float32) / np.float32(count + 1)


# ---------------------------------------------------------------------- without PyTorch
def test_glue_imports_neither_pytorch_nor_an_openmmlab_library():
    code = (
        "import sys\nfor name in ('torch', 'mmcv', 'mmdet', 'mmengine', 'cv2'): sys.modules[name] = None\n"
        'import psaq_mm.runtime.detection as d\nprint(d.DetectorSettings().to_dict()["classes"])'
    )
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == '1', done.stderr


# ---------------------------------------------------------------------- settings
def test_settings_survive_json():
    import json

    values = dict(
        classes=3,
        dense=dict(priors=dict(strides=[[4, 4]], base_anchors=[[[0, 0, 1, 1]]]), nms=dict(iou_threshold=0.7)),
        box=[dict(align=dict(strides=[4]), coding=dict(stds=[0.1, 0.1, 0.2, 0.2]))],
        mask=[dict(align=dict(size=[14, 14], strides=[4]))],
    )
    one = DetectorSettings.from_dict(values)
    assert DetectorSettings.from_dict(json.loads(json.dumps(one.to_dict()))) == one
    assert one.box[0].coding.stds == (0.1, 0.1, 0.2, 0.2) and one.dense.priors.base_anchors == (((0, 0, 1, 1),),)


@pytest.mark.parametrize(
    'values, said',
    [
        (dict(boxes=[]), 'detector.boxes is no setting: did you mean box'),
        (dict(dense=dict(activation='relu')), "dense.activation='relu'"),
        (dict(dense=dict(nms=dict(kind='fast'))), "nms.kind='fast'"),
        (dict(mask=[dict()]), 'one-stage'),
    ],
)
def test_unknown_settings_are_refused(values, said):
    with pytest.raises(ConfigError, match=said.replace('.', r'\.')):
        DetectorSettings.from_dict(values)


# ---------------------------------------------------------------------- scores
@given(st.lists(st.integers(0, 6), min_size=1, max_size=40), st.integers(0, 45))
def test_best_is_the_head_of_a_stable_sort(values, count):
    scores = np.array(values, np.float32)
    wanted = sorted(range(len(values)), key=lambda i: -values[i])[:count]
    assert best(scores, count).tolist() == wanted


def test_scores_are_those_of_pytorch():
    logits = np.random.default_rng(0).normal(0, 8, (500, 7)).astype(np.float32)
    logits[0] = [200, -200, 0, 90, -90, 100, -100]
    np.testing.assert_allclose(sigmoid(logits), tensor(logits).sigmoid().numpy(), rtol=3e-7)
    np.testing.assert_allclose(softmax(logits), tensor(logits).softmax(-1).numpy(), rtol=1e-6, atol=1e-38)
    assert sigmoid(logits).dtype == softmax(logits).dtype == np.float32


# ---------------------------------------------------------------------- suppression
@settings(max_examples=40)
@given(seeds, st.integers(1, 300), st.booleans(), st.sampled_from([0.0, 0.3, 0.5, 0.7, 1.0]))
def test_nms_keeps_what_mmcv_keeps(seed, count, whole, threshold):
    ops = pytest.importorskip('mmcv.ops')
    rng = np.random.default_rng(seed)
    boxes, scores = random_boxes(rng, count, whole), distinct_scores(rng, count)
    wanted = ops.nms(tensor(boxes), tensor(scores), threshold)[1].tolist()
    assert nms(boxes, scores, threshold).tolist() == wanted
    limit = len(wanted) // 2
    assert nms(boxes, scores, threshold, limit).tolist() == wanted[:limit]


def test_a_box_is_kept_whose_overlap_is_the_threshold():
    boxes = np.array([[0, 0, 4, 4], [0, 0, 4, 2]], np.float32)
    scores = np.array([0.9, 0.8], np.float32)
    assert len(nms(boxes, scores, 0.5)) == 2
    assert len(nms(boxes, scores, 0.4999)) == 1


@settings(max_examples=40)
@given(
    seeds,
    st.integers(1, 200),
    st.fixed_dictionaries(
        dict(iou_threshold=st.sampled_from([0.3, 0.5])),
        optional=dict(class_agnostic=st.booleans(), split_thr=st.sampled_from([50, 10000]), max_num=st.just(7)),
    ),
)
def test_classes_are_suppressed_as_by_mmcv(seed, count, config):
    ops = pytest.importorskip('mmcv.ops')
    from psaq_mm.deploy.detectors import _suppression

    rng = np.random.default_rng(seed)
    # At large coordinates the distance between classes rounds boxes; that has to be the same rounding.
    boxes, scores = random_boxes(rng, count, size=rng.choice([60, 1333])), distinct_scores(rng, count)
    groups = rng.integers(0, 80, count) if rng.random() < 0.5 else rng.integers(0, 3, count)
    wanted, kept = ops.batched_nms(tensor(boxes), tensor(scores), tensor(groups), dict(config, type='nms'))
    positions, left = suppress(_suppression(config), boxes, scores, groups)
    assert positions.tolist() == kept.tolist()
    np.testing.assert_array_equal(left, wanted[:, 4].numpy())
    head, _ = suppress(_suppression(config), boxes, scores, groups, limit=5)
    assert head.tolist() == kept.tolist()[:5]


@given(seeds, st.integers(1, 80), st.sampled_from(['naive', 'linear', 'gaussian']), st.sampled_from([0.0, 0.05, 0.5]))
@settings(max_examples=40)
def test_soft_suppression_is_that_of_mmcv(seed, count, method, least):
    ops = pytest.importorskip('mmcv.ops')
    rng = np.random.default_rng(seed)
    boxes, scores, groups = random_boxes(rng, count), distinct_scores(rng, count), rng.integers(0, 3, count)
    config = dict(type='soft_nms', iou_threshold=0.4, method=method, min_score=least, sigma=0.6)
    wanted, kept = ops.batched_nms(tensor(boxes), tensor(scores), tensor(groups), config)
    positions, left = suppress(
        Suppression(kind='soft_nms', iou_threshold=0.4, method=method, min_score=least, sigma=0.6),
        boxes,
        scores,
        groups,
    )
    lowered_to_nothing = wanted[:, 4].numpy() == 0  # by 'naive' without a least score: equal scores have no order
    assert positions[~lowered_to_nothing].tolist() == kept[~lowered_to_nothing].tolist()
    np.testing.assert_allclose(left, wanted[:, 4].numpy(), rtol=2e-6)


def test_without_suppression_boxes_are_sorted():
    scores = np.array([0.2, 0.9, 0.5], np.float32)
    positions, _ = suppress(Suppression(kind='none'), np.zeros((3, 4), np.float32), scores, np.zeros(3, int), limit=2)
    assert positions.tolist() == [1, 2]
    for kind in ('none', 'nms', 'soft_nms'):
        positions, left = suppress(Suppression(kind=kind), np.zeros((0, 4), np.float32), scores[:0], np.zeros(0, int))
        assert positions.shape == left.shape == (0,)


# ---------------------------------------------------------------------- boxes
@given(seeds, st.booleans(), st.booleans(), st.sampled_from([0.2, 2.0, 30.0]))
@settings(max_examples=40)
def test_deltas_are_decoded_as_by_mmdet(seed, clip, clamp, spread):
    coders = pytest.importorskip('mmdet.models.task_modules.coders')
    from psaq_mm.deploy.detectors import _coding

    rng = np.random.default_rng(seed)
    boxes, deltas = random_boxes(rng, 50), rng.normal(0, spread, (50, 4)).astype(np.float32)
    coder = coders.DeltaXYWHBBoxCoder(
        (0.1, 0.0, -0.2, 0.3), (0.1, 0.1, 0.2, 0.2), clip_border=clip, add_ctr_clamp=clamp, ctr_clamp=9
    )
    wanted = coder.decode(tensor(boxes), tensor(deltas), max_shape=(40, 50)).numpy()
    np.testing.assert_allclose(decode(_coding(coder), boxes, deltas, (40, 50)), wanted, rtol=3e-7, atol=4e-6)


@given(seeds, st.booleans())
@settings(max_examples=10)
def test_distances_are_decoded_as_by_mmdet(seed, clip):
    coders = pytest.importorskip('mmdet.models.task_modules.coders')
    rng = np.random.default_rng(seed)
    points, distances = (rng.uniform(-5, 60, (50, n)).astype(np.float32) for n in (2, 4))
    coder = coders.DistancePointBBoxCoder(clip_border=clip)
    wanted = coder.decode(tensor(points), tensor(distances), max_shape=(40, 50)).numpy()
    np.testing.assert_array_equal(decode(BoxCoding(kind='distance', clip=clip), points, distances, (40, 50)), wanted)


@pytest.mark.parametrize(
    'generator, settings',
    [
        ('AnchorGenerator', dict(strides=[4, 8], ratios=[0.5, 1.0, 2.0], scales=[8, 9.5])),
        ('AnchorGenerator', dict(strides=[(4, 6), (8, 8)], ratios=[1.0], scales=[8], center_offset=0.5)),
        ('AnchorGenerator', dict(strides=[8, 16], ratios=[0.5, 1.0], octave_base_scale=4, scales_per_octave=3)),
        ('SSDAnchorGenerator', dict(strides=[8, 16, 32], ratios=([2], [2, 3], [2]), basesize_ratio_range=(0.2, 0.9))),
        ('MlvlPointGenerator', dict(strides=[4, (8, 12)], offset=0.5)),
        ('MlvlPointGenerator', dict(strides=[7, 14], offset=0)),
    ],
)
def test_priors_are_those_of_mmdet(generator, settings):
    generators = pytest.importorskip('mmdet.models.task_modules.prior_generators')
    from psaq_mm.deploy.detectors import _priors

    made = getattr(generators, generator)(**settings)
    sizes = [(5, 7), (3, 4), (2, 1)][: len(made.strides)]
    ours = _priors(made, centers=False)
    for level, wanted in enumerate(made.grid_priors(sizes, device='cpu')):
        positions = np.arange(len(wanted))[::-1]
        np.testing.assert_array_equal(level_priors(ours, level, sizes[level], positions), wanted.numpy()[::-1])


def test_centres_of_anchors_are_the_points():
    anchors = Priors(strides=((8, 8),), base_anchors=(((-2.0, -4.0, 6.0, 8.0),),), centers=True)
    assert level_priors(anchors, 0, (3, 3), np.array([0, 4])).tolist() == [[2, 2], [10, 10]]


# ---------------------------------------------------------------------- RoIAlign
@given(
    seeds,
    st.sampled_from([0, 1, 2, 3]),
    st.booleans(),
    st.sampled_from([(7, 7), (14, 14), (3, 5), (1, 1)]),
    st.sampled_from([1, 4, 37]),
)
@settings(max_examples=40)
def test_roi_align_is_that_of_mmcv(seed, ratio, aligned, size, stride):
    ops = pytest.importorskip('mmcv.ops')
    rng = np.random.default_rng(seed)
    levels = rng.standard_normal((2, 13, 17, 8), dtype=np.float32)
    boxes = random_boxes(rng, 20, size=20 * stride) - np.float32(rng.choice([0, 3 * stride]))
    boxes[0, 2:] = boxes[0, :2]  # of size 0
    boxes[1, 2] = boxes[1, 0]  # of width 0
    boxes[2] = [-90 * stride, -90 * stride, -80 * stride, -85 * stride]  # outside
    boxes[3] = [-2 * stride, 0, 40 * stride, 2 * stride]  # long and thin, larger than the map
    pictures = rng.integers(0, 2, 20)
    rois = torch.cat([tensor(pictures)[:, None].float(), tensor(boxes)], 1)
    layer = ops.RoIAlign(size, 1 / stride, ratio, aligned=aligned)
    wanted = layer(tensor(levels.transpose(0, 3, 1, 2)), rois).permute(0, 2, 3, 1).numpy()
    align = RoiAlignSettings(size=size, strides=(stride,), channels=8, sampling_ratio=ratio, aligned=aligned)
    features = roi_align(align, [levels], Rois(boxes, pictures))
    np.testing.assert_allclose(features, wanted, atol=2e-6)
    planes = np.ascontiguousarray(levels.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)
    np.testing.assert_allclose(roi_align(align, [planes], Rois(boxes, pictures)), wanted, atol=2e-6)


def test_roi_align_of_no_roi_and_with_threads():
    align = RoiAlignSettings(strides=(4, 8), channels=16)
    rng = np.random.default_rng(0)
    levels = [rng.standard_normal((1, 50 // n, 70 // n, 16), dtype=np.float32) for n in (1, 2)]
    boxes, pictures = random_boxes(rng, 300, size=200), np.zeros(300, np.int64)
    assert roi_align(align, levels, Rois(boxes[:0], pictures[:0])).shape == (0, 7, 7, 16)
    one, several = (roi_align(align, levels, Rois(boxes, pictures), threads) for threads in (None, 3))
    np.testing.assert_array_equal(one, several)


@given(seeds, st.sampled_from([28, 56, 56.5]), st.integers(1, 5))
@settings(max_examples=40)
def test_rois_read_the_level_of_mmdet(seed, finest, count):
    extractors = pytest.importorskip('mmdet.models.roi_heads.roi_extractors')
    rng = np.random.default_rng(seed)
    boxes = np.concatenate(
        [random_boxes(rng, 50, size=1300), [[0, 0, finest * 2**i, finest * 2**i] for i in range(6)]]
    ).astype(np.float32)
    extractor = extractors.SingleRoIExtractor(dict(type='RoIAlign', output_size=7), 8, [4] * count, finest)
    wanted = extractor.map_roi_levels(torch.cat([torch.zeros(len(boxes), 1), tensor(boxes)], 1), count)
    np.testing.assert_array_equal(roi_levels(boxes, finest, count), wanted.numpy())


# ---------------------------------------------------------------------- masks
@given(seeds, st.sampled_from([28, 14, 5]))
@settings(max_examples=40)
def test_masks_are_pasted_as_by_mmdet(seed, side):
    heads = pytest.importorskip('mmdet.models.roi_heads.mask_heads.fcn_mask_head')
    rng = np.random.default_rng(seed)
    boxes = np.clip(random_boxes(rng, 12) - np.float32(5), [-5, -5, 0, 0], [70, 40, 70, 40]).astype(np.float32)
    boxes[:2] = np.maximum(boxes[:2], 0)
    boxes[0, 2:] = boxes[0, :2]
    boxes[1, 3] = boxes[1, 1]
    boxes[2] = [3.5, 4.5, 3.5, 20]  # without width, through the centres of pixels
    boxes[3] = [-30, -30, 300, 200]
    boxes[4] = [200, 10, 220, 30]  # beside the picture
    masks = rng.uniform(0, 1, (12, side, side)).astype(np.float32)
    wanted = np.zeros((12, 40, 70), bool)
    for i, box in enumerate(boxes):
        if i == 4:
            continue  # mmdet cannot index a picture beside of itself
        pixels, (rows, columns) = heads._do_paste_mask(tensor(masks[i : i + 1, None]), tensor(box[None]), 40, 70)
        wanted[i, rows, columns] = (pixels[0] >= 0.5).numpy()
    pasted = paste(masks, boxes, (40, 70), 0.5)
    assert pasted.dtype == bool and pasted.shape == wanted.shape
    assert (pasted != wanted).sum() <= 1, np.argwhere(pasted != wanted)


def test_no_mask_is_an_empty_array():
    assert paste(np.zeros((0, 28, 28), np.float32), np.zeros((0, 4), np.float32), (5, 6), 0.5).shape == (0, 5, 6)


# ---------------------------------------------------------------------- what does not fit
@pytest.mark.parametrize('threshold', [0.05, 0.5, 0.9999])
@pytest.mark.parametrize('layout', ['planar', 'channel-last'])
def test_scores_above_a_threshold_are_those_of_the_sigmoid(threshold, layout):
    """Also those that are the threshold itself, or next to it."""
    classes, priors, random = 5, 3, np.random.default_rng(0)
    logit = np.float32(np.log(threshold / (1 - threshold)))
    maps = (logit + random.normal(0, 2, (7, 9, priors * classes))).astype(np.float32)
    near = logit + np.arange(-50, 50, dtype=np.float32) * np.spacing(logit if logit else np.float32(1e-7))
    maps.reshape(-1)[random.permutation(maps.size)[: len(near)]] = near
    maps = maps.transpose(2, 0, 1)
    maps = np.ascontiguousarray(maps) if layout == 'planar' else maps
    scores = sigmoid(maps.transpose(1, 2, 0).reshape(-1, classes))
    wanted = np.nonzero(scores > np.float32(threshold))
    found = _above_threshold(DenseSettings(channels=classes, score_threshold=threshold), maps)
    assert 0 < len(wanted[0]) < scores.size
    assert all(np.array_equal(a, b) for a, b in zip(found, (*wanted, scores[wanted])))


def test_maps_that_do_not_fit_are_refused():
    align = dict(strides=[4, 8], channels=16)
    settings = DetectorSettings.from_dict(
        dict(dense=dict(priors=dict(strides=[[4, 4]], base_anchors=[[[0, 0, 8, 8]]])), box=[dict(align=align)])
    )
    dense = [[np.zeros((1, 1, 6, 6), np.float32)], [np.zeros((1, 4, 6, 6), np.float32)]]
    info = [ImageInfo((24, 24), (24, 24))]
    with pytest.raises(DataError, match='export the model again'):
        detect(settings, [], [[], []], None, info)
    for levels in ([np.zeros((1, 6, 6, 8))] * 2, [np.zeros((1, 6, 6, 16))]):
        with pytest.raises(DataError, match='16 channels of 2 levels'):
            detect(settings, levels, dense, object(), info)
