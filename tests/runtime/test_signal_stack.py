"""OpenVINO leaves the alternate signal stack of a thread as it was: a handler that runs on a freed one ends the
process."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import ctypes
import signal
import subprocess
import threading

import numpy as np
from onnx import helper

from psaq_mm.errors import ConfigError
from psaq_mm.runtime.backends.openvino import OpenVino


class Stack(ctypes.Structure):
    _fields_ = [('address', ctypes.c_void_p), ('flags', ctypes.c_int), ('size', ctypes.c_size_t)]


def stack():
    found = Stack()
    assert not ctypes.CDLL(None).sigaltstack(None, ctypes.byref(found))
    return found.address, found.flags, found.size


def run(order):
    before = stack()
    models = {i: OpenVino.begin(graph, 1, 'float') for i in range(len(order))}
    for i in order:
        del models[i]
        for model in models.values():
            assert model.run(inputs)['y'].tolist() == [[0, 2]]
        called = len(calls)
        subprocess.run(['true'], check=True)
        # Python calls it later where this is another thread than the main one; the signal has come all the same.
        assert len(calls) > called or threading.current_thread() is not threading.main_thread()
    try:
        OpenVino.begin(graph, 1, 'float', settings=dict(NUM_STREAMS='many'))
    except ConfigError:
        pass
    else:
        raise AssertionError('a wrong setting was taken')
    assert stack() == before, order


x, y = (helper.make_tensor_value_info(name, 1, [1, 2]) for name in 'xy')
nodes = helper.make_graph([helper.make_node('Relu', ['x'], ['y'])], 'g', [x], [y])
graph = helper.make_model(nodes, opset_imports=[helper.make_opsetid('', 13)], ir_version=8).SerializeToString()
inputs = dict(x=np.float32([[-1, 2]]))
calls = []
# PyTorch's data loader leaves such a handler behind; Python has it run on the alternate stack.
signal.signal(signal.SIGCHLD, lambda *_: calls.append(1))
memory = ctypes.create_string_buffer(1 << 16)
own = Stack(ctypes.cast(memory, ctypes.c_void_p), 0, 1 << 16)
for place in ('none', 'own'):
    if place == 'own':
        assert not ctypes.CDLL(None).sigaltstack(ctypes.byref(own), None)
    for order in ((0, 1), (1, 0), (1, 2, 0)):
        run(order)
ended = []
thread = threading.Thread(target=lambda: ended.append(run((0, 1))))
thread.start()
thread.join()
assert ended, 'the models of a thread'
print('alive')
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='OpenVINO sets a signal stack on Linux alone')
def test_handlers_run_on_the_stack_of_before_whatever_model_is_deleted_first():
    pytest.importorskip('openvino')
    done = subprocess.run([sys.executable, '-c', SCRIPT], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout == 'alive\n', (done.returncode, done.stderr[-2000:])
