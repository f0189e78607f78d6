import importlib.util
import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest

SOURCE = Path(__file__).parents[2] / 'demo' / 'scenes.py'
_spec = importlib.util.spec_from_file_location('demo_scenes', SOURCE)
scenes = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(scenes)


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


@pytest.fixture(scope='module')
def small_set(tmp_path_factory):
    out, fresh = scenes.make_scenes(tmp_path_factory.mktemp('set') / 'scenes', dict(train=12, val=5), size=96, seed=3)
    assert fresh
    return out


def test_layout_is_coco_and_ade(small_set):
    names = set(files_of(small_set))
    wanted = {'scenes.json'}
    for split, ade, count in (('train', 'training', 12), ('val', 'validation', 5)):
        wanted.add(f'detection/annotations/instances_{split}.json')
        for number in range(count):
            wanted |= {
                f'detection/{split}/{number:06d}.png',
                f'segmentation/images/{ade}/{number:06d}.png',
                f'segmentation/annotations/{ade}/{number:06d}.png',
            }
    assert names == wanted


def test_same_seed_gives_the_same_bytes_and_another_seed_does_not(small_set, tmp_path):
    again, _ = scenes.make_scenes(tmp_path / 'again', dict(train=12, val=5), size=96, seed=3)
    assert files_of(again) == files_of(small_set)
    other, _ = scenes.make_scenes(tmp_path / 'other', dict(train=1), size=96, seed=4)
    name = 'detection/train/000000.png'
    assert files_of(other)[name] != files_of(small_set)[name]


def test_a_scene_depends_on_its_number_not_on_the_size_of_the_set(small_set):
    image = cv2.imread(str(small_set / 'detection/train/000011.png'))
    np.testing.assert_array_equal(image, scenes.scene('train', 11, size=96, seed=3).image)


def test_no_scene_of_val_is_in_train(small_set):
    files = files_of(small_set)
    train = {data for name, data in files.items() if name.startswith('detection/train/')}
    val = {data for name, data in files.items() if name.startswith('detection/val/')}
    assert len(train) == 12 and len(val) == 5 and not train & val


@pytest.mark.parametrize('split', scenes.SPLITS)
def test_coco_masks_agree_with_boxes_areas_and_the_scene_drawn(small_set, split):
    COCO = pytest.importorskip('pycocotools.coco').COCO
    coco = COCO(str(small_set / f'detection/annotations/instances_{split}.json'))
    assert [category['name'] for category in coco.loadCats(coco.getCatIds())] == list(scenes.CLASSES)
    for image_id in coco.getImgIds():
        info = coco.loadImgs(image_id)[0]
        assert (info['height'], info['width']) == (96, 96)
        painted = np.zeros((96, 96), np.uint8)
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=image_id))
        assert annotations
        for annotation in annotations:
            mask = coco.annToMask(annotation).astype(bool)
            assert annotation['iscrowd'] == 0 and annotation['area'] == mask.sum() > 0
            rows, columns = np.nonzero(mask)
            x, y, width, height = annotation['bbox']
            assert (x, y, x + width, y + height) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert not painted[mask].any(), 'visible parts of two objects overlap'
            painted[mask] = annotation['category_id']
        np.testing.assert_array_equal(painted, scenes.scene(split, image_id, size=96, seed=3).labels)


@pytest.mark.parametrize('split, ade', sorted(scenes.ADE_SPLITS.items()))
def test_label_pictures_are_those_of_the_scenes_with_hues(small_set, split, ade):
    for path in sorted((small_set / f'segmentation/annotations/{ade}').iterdir()):
        labels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        assert labels.dtype == np.uint8 and labels.shape == (96, 96) and labels.max() <= len(scenes.CLASSES)
        drawn = scenes.scene(split, int(path.stem), size=96, seed=3, hues=True)
        np.testing.assert_array_equal(labels, drawn.labels)
        image = cv2.imread(str(small_set / f'segmentation/images/{ade}/{path.name}'))
        np.testing.assert_array_equal(image, drawn.image)


def test_hues_tell_the_class_only_where_they_are_asked_for():

    def hue_of_squares(hues):
        found = []
        for seed in range(60):
            item = scenes.draw_scene(np.random.default_rng(seed), 96, hues)
            square = item.labels == 1 + scenes.CLASSES.index('square')
            if square.any():
                found.append(
                    cv2.cvtColor(item.image[square].mean(0)[None, None].astype(np.uint8), cv2.COLOR_BGR2HSV)[0, 0, 0]
                )
        assert len(found) > 15
        return np.abs((np.array(found, dtype=float) * 2 - 60 + 180) % 360 - 180)  # degrees from the squares' hue

    assert np.median(hue_of_squares(True)) < 25 < 50 < np.median(hue_of_squares(False))


def test_run_lengths_agree_with_pycocotools():
    codec = pytest.importorskip('pycocotools.mask')
    rng = np.random.default_rng(0)
    shapes = [(1, 1), (5, 7), (16, 3)]
    masks = [rng.random(shape) < density for shape in shapes for density in (0.0, 0.3, 0.7, 1.0)]
    for mask in masks:
        code = scenes.encode_rle(mask)
        assert sum(code['counts']) == mask.size
        decoded = codec.decode(codec.frPyObjects(code, *mask.shape))
        np.testing.assert_array_equal(decoded.astype(bool), mask)


def test_scenes_hold_every_class_and_enough_of_each_object():
    drawn = [scenes.draw_scene(np.random.default_rng(seed), 96) for seed in range(40)]
    seen = {index for item in drawn for index in item.classes}
    assert seen == set(range(len(scenes.CLASSES)))
    for item in drawn:
        assert item.image.dtype == item.labels.dtype == np.uint8 and item.image.shape == (96, 96, 3)
        assert set(np.unique(item.labels)) == {0} | {index + 1 for index in item.classes}
        assert 1 <= len(item.masks) <= 6 and item.masks.sum(0).max() == 1
        assert item.image.std() > 5


def test_a_complete_set_is_reused_untouched(small_set):
    before = {path: path.stat().st_mtime_ns for path in small_set.rglob('*')}
    for counts in (dict(train=12, val=5), dict(val=5)):
        out, fresh = scenes.make_scenes(small_set, counts, size=96, seed=3)
        assert out == small_set and not fresh
    assert {path: path.stat().st_mtime_ns for path in small_set.rglob('*')} == before


def test_other_settings_replace_the_set(tmp_path):
    out = tmp_path / 'scenes'
    scenes.make_scenes(out, dict(train=3), size=64)
    _, fresh = scenes.make_scenes(out, dict(val=2), size=64)
    assert fresh and not (out / 'detection/train').exists()
    assert os.listdir(tmp_path) == ['scenes']


@pytest.mark.parametrize('had_one', [False, True])
def test_an_interrupted_run_leaves_what_was_there(tmp_path, monkeypatch, had_one):
    out = tmp_path / 'scenes'
    if had_one:
        scenes.make_scenes(out, dict(val=2), size=64)
    before = files_of(tmp_path)
    write, written = scenes._write, []

    def interrupted(path, image):
        if len(written) == 5:
            raise KeyboardInterrupt
        written.append(path)
        write(path, image)

    monkeypatch.setattr(scenes, '_write', interrupted)
    with pytest.raises(KeyboardInterrupt):
        scenes.make_scenes(out, dict(train=4), size=64)
    assert written and files_of(tmp_path) == before
    assert os.listdir(tmp_path) == (['scenes'] if had_one else [])


def test_an_interrupted_move_puts_the_old_set_back(tmp_path, monkeypatch):
    out = tmp_path / 'scenes'
    scenes.make_scenes(out, dict(val=2), size=64)
    before, rename = files_of(tmp_path), Path.rename

    def interrupted(self, target):
        if self.name == 'new':
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, 'rename', interrupted)
    with pytest.raises(KeyboardInterrupt):
        scenes.make_scenes(out, dict(train=1), size=64)
    assert files_of(tmp_path) == before


def test_a_set_that_another_process_made_meanwhile_is_taken(tmp_path, monkeypatch):
    out, write_split = tmp_path / 'scenes', scenes._write_split

    def beaten(*args):
        monkeypatch.setattr(scenes, '_write_split', write_split)
        scenes.make_scenes(out, dict(val=2), size=64)
        write_split(*args)

    monkeypatch.setattr(scenes, '_write_split', beaten)
    assert scenes.make_scenes(out, dict(val=2), size=64) == (out, False)
    assert len(files_of(out)) == 8 and os.listdir(tmp_path) == ['scenes']


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / 'precious.txt').write_text('mine')
    with pytest.raises(ValueError, match='holds something that is no set of scenes'):
        scenes.make_scenes(tmp_path, dict(val=1), size=64)
    assert files_of(tmp_path) == {'precious.txt': b'mine'}


@pytest.mark.parametrize(
    'counts, size, message',
    [
        (dict(test=3), 96, 'test'),
        (dict(), 96, 'train, val'),
        (dict(train=0), 96, '0 scenes for train'),
        (dict(train=1), 32, 'size=32'),
    ],
)
def test_bad_requests_are_refused_and_write_nothing(tmp_path, counts, size, message):
    with pytest.raises(ValueError, match=message):
        scenes.make_scenes(tmp_path / 'scenes', counts, size=size)
    assert not os.listdir(tmp_path)


def test_command_line(tmp_path, capsys):
    arguments = ['--out', str(tmp_path / 'scenes'), '--split', 'val', '--num-val', '2', '--size', '64']
    assert scenes.main(arguments) == 0 and capsys.readouterr().out.startswith('made')
    assert scenes.main(arguments) == 0 and capsys.readouterr().out.startswith('reused')
    assert json.loads((tmp_path / 'scenes/scenes.json').read_text())['scenes'] == {'val': 2}
    assert scenes.main(arguments[:-1] + ['8']) == 2 and 'size=8' in capsys.readouterr().err
