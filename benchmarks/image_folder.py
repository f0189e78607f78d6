# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""A config for a flat folder of labelled photographs, one part for calibration, the other evaluated.

    python benchmarks/image_folder.py DATA CHECKPOINT --model deit_tiny --out work_dirs/classification

DATA holds files named ``<class index>_<anything>.jpg``. Images with an even index are the training set, from which a
control may calibrate, those with an odd one the test set; so no image that is evaluated ever sets a range. The config
inherits ``configs/classification/<model>.py`` and is what ``tools/compare.py`` and the other tools take.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import List, Sequence, Tuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from psaq_mm.files import write_whole  # noqa: E402

_NAME = re.compile(r'(\d+)_.+\.(jpe?g|png)', re.IGNORECASE)


def labelled(folder: Path) -> List[Tuple[str, int]]:
    """Names and class indices of the images of a folder, in the order of their names.

    Raises:
        SystemExit: There are none.
    """
    names = sorted(path.name for path in Path(folder).iterdir()) if Path(folder).is_dir() else []
    images = [(name, int(match[1])) for name in names if (match := _NAME.fullmatch(name))]
    if not images:
        raise SystemExit(f'{folder} holds no images called <class index>_<name>.jpg: give another folder')
    return images


def write_config(folder: Path, checkpoint: Path, model: str, out: Path) -> Path:
    """Write the two lists of images and the config that reads them; the config's path.

    Raises:
        SystemExit: No such model, checkpoint or images.
    """
    base = ROOT / 'configs' / 'classification' / f'{model}.py'
    if not base.is_file():
        known = ', '.join(sorted(path.stem for path in base.parent.glob('*.py')))
        raise SystemExit(f'--model {model} is not known: use one of {known}')
    if not Path(checkpoint).is_file():
        raise SystemExit(f'there is no checkpoint {checkpoint}: check the path')
    images, out = labelled(folder), Path(out).resolve()
    for part, name in ((0, 'calibration'), (1, 'evaluation')):
        lines = [f'{file} {label}' for file, label in images if label % 2 == part]
        write_whole(out / f'{name}.txt', '\n'.join(lines) + '\n')
    path = out / f'{model}.py'
    write_whole(
        path,
        f"""_base_ = [{str(base)!r}]
load_from = {str(Path(checkpoint).resolve())!r}
dataset = dict(
    type='CustomDataset', data_root={str(Path(folder).resolve())!r}, pipeline={{{{_base_.pipeline}}}}, _delete_=True)
train_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(ann_file={str(out / 'calibration.txt')!r}, **dataset))
test_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(ann_file={str(out / 'evaluation.txt')!r}, **dataset))
val_dataloader = test_dataloader
del dataset
""",
    )
    return path


def main(argv: Sequence[str] = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data', type=Path)
    parser.add_argument('checkpoint', type=Path)
    parser.add_argument('--model', default='deit_tiny')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/classification'))
    args = parser.parse_args(argv)
    print(write_config(args.data, args.checkpoint, args.model, args.out))
    return 0


if __name__ == '__main__':
    sys.exit(main())
