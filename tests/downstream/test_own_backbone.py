"""The project's own backbone: one registered class in the project, and everything of psaq_mm works with it."""

import numpy as np
import pytest
import torch
from tiny import build_full_precision

from psaq_mm.commands.dfq_train import main as dfq_train
from psaq_mm.commands.inspect import main as inspect_command
from psaq_mm.commands.sensitivity import main as sensitivity_command
from psaq_mm.engine.checkpoint import read_checkpoint

pytest.importorskip('mmdet')
pytestmark = pytest.mark.filterwarnings('ignore')
CONFIG = 'configs/seam_detector_w4a8.py'


@pytest.fixture(scope='module')
def seams(welds):
    """The project with a full-precision checkpoint of this detector."""
    from mmengine.config import Config
    from welds import WeldDataset

    model = build_full_precision(Config.fromfile('configs/seam_detector.py'))
    torch.save(dict(state_dict=model.state_dict(), meta=dict(dataset_meta=WeldDataset.METAINFO)), 'seam_detector.pth')
    return welds


@pytest.fixture(scope='module')
def student(seams):
    assert dfq_train([CONFIG, '--work-dir', 'seam_work', '--cfg-options', 'dfq.rotate=True']) == 0
    return seams / 'seam_work' / 'student.pth'


def test_nothing_of_the_package_knows_it(seams):
    from psaq_mm.models.adapters import BACKBONES

    own = [backbone for backbone in BACKBONES if not type(backbone).__module__.startswith('psaq_mm.')]
    assert not own or {type(backbone).__module__ for backbone in own} == {'welds.seam_net_quant'}


def test_what_stays_in_floating_point_is_told(seams, capsys):
    assert inspect_command([CONFIG]) == 0
    text = capsys.readouterr().out
    assert 'backbone.stages.1.1.attn.matmul_qk' in text
    assert 'every product of two activations inside the scope is one of the rows above' in text
    assert 'RepQ folding: the LayerNorms of 8 layers' in text and 'patch similarity: 4 attention modules' in text
    assert 'rotation: the stream of stage 1 (16 channels), the stream of stage 2 (32 channels)' in text


def test_the_student_is_rotated_calibrated_and_served(seams, student):
    from mmdet.apis import inference_detector, init_detector

    plain, quantized = (read_checkpoint(path)['state_dict'] for path in ('seam_detector.pth', student))
    assert not torch.equal(plain['backbone.stem.weight'], quantized['backbone.stem.weight'])  # rotated
    model = init_detector(CONFIG, str(student), device='cpu')
    picture = np.random.default_rng(1).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    assert len(inference_detector(model, picture).pred_instances) > 0


def test_its_layers_are_weighed_by_their_error(seams, student, capsys):
    assert sensitivity_command([CONFIG, 'seam_detector.pth', '--number', '2', '--work-dir', 'seam_sensitivity']) == 0
    assert 'backbone.stages' in capsys.readouterr().out
