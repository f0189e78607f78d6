"""Flaws in weld seams, one line a flaw: ``picture class left top right bottom``."""
from pathlib import Path

from mmdet.datasets import BaseDetDataset
from mmdet.registry import DATASETS


CLASSES = ('pore', 'crack', 'slag')


@DATASETS.register_module()
class WeldDataset(BaseDetDataset):
    """A format that no library knows. ``opened`` counts how often anybody has read annotations."""
    METAINFO = dict(classes=CLASSES, palette=[(230, 80, 70), (70, 140, 230), (90, 190, 90)])
    opened = 0

    def load_data_list(self):
        """One dict a picture, as mmdet's pipelines take it."""
        type(self).opened += 1
        pictures = {}
        for line in Path(self.ann_file).read_text().splitlines():
            name, label, *box = line.split()
            instance = dict(bbox=[float(side) for side in box], bbox_label=self.metainfo['classes'].index(label), ignore_flag=0)
            pictures.setdefault(name, []).append(instance)
        return [dict(img_id=number, img_path=str(Path(self.data_prefix['img']) / name), height=64, width=64, instances=instances)
                for number, (name, instances) in enumerate(sorted(pictures.items()))]
