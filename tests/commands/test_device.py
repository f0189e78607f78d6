"""--device: MMEngine runs where the command line says, and a device that is not there is told in one sentence."""

import pytest
import torch
from mmengine.device import get_device, utils

from psaq_mm.commands.dfq_train import main as quantize
from psaq_mm.commands.sensitivity import main as sensitivity
from psaq_mm.engine.device import checked_device, on_device
from psaq_mm.errors import ConfigError


def test_inside_the_block_mmengine_uses_it(monkeypatch):
    monkeypatch.setattr(utils, 'DEVICE', 'elsewhere')
    with on_device('cpu') as device:
        assert get_device() == 'cpu' and device == torch.device('cpu')
    assert get_device() == 'elsewhere'
    with pytest.raises(KeyboardInterrupt), on_device('cpu'):
        raise KeyboardInterrupt
    assert get_device() == 'elsewhere', 'a run that was stopped leaves nothing behind'


@pytest.mark.parametrize('name', ['cuda:2', 'cuda:7'])
def test_a_gpu_that_is_not_there_is_told_with_those_that_are(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    assert checked_device('cuda:1') == torch.device('cuda:1') and checked_device('cuda') == torch.device('cuda')
    with pytest.raises(ConfigError) as error:
        checked_device(name)
    assert str(error.value) == (
        f'--device {name} is not there (PyTorch {torch.__version__} finds cuda:0 and cuda:1 here): give cuda:0 or '
        'cuda:1 or cpu'
    )


@pytest.mark.parametrize('name', ['cuda', 'cuda:0', 'mps', 'cpu:1', 'xpu'])
def test_without_a_gpu_the_cpu_is_named(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(utils, 'DEVICE', 'cpu')
    with pytest.raises(ConfigError, match=rf'--device {name} is not there \(PyTorch .* finds no GPU here\): give cpu$'):
        checked_device(name)


@pytest.mark.parametrize('command', [quantize, sensitivity])
def test_a_wrong_name_is_one_sentence_of_the_command(capsys, command):
    arguments = ['C.py', 'F.pth'] if command is sensitivity else ['C.py']
    assert command([*arguments, '--device', 'gpu0']) == 1
    assert capsys.readouterr().err.endswith(
        ': --device gpu0 is no name of a device: give cpu, cuda, or cuda:1 and so on\n'
    )


def test_processes_of_a_launcher_have_devices_of_their_own(capsys):
    assert quantize(['C.py', '--device', 'cpu', '--launcher', 'pytorch']) == 1
    assert 'contradict each other' in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_on_a_machine_with_a_gpu_both_are_there():
    with on_device('cuda:0'):
        assert get_device() == 'cuda' and torch.cuda.current_device() == 0
    with on_device('cpu'):
        assert get_device() == 'cpu'
