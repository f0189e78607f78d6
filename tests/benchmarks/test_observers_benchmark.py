"""The benchmark of ranges per channel: a fair rival, and a check that can fail."""

import sys

import pytest
import torch

from benchmarks import channel_ranges


@pytest.mark.parametrize('bits', [4, 8])
def test_both_methods_find_the_same_ranges(bits):
    images = channel_ranges.layer_norm_outputs(2, 1000, 12)
    mine, other = channel_ranges.ours(images, bits), channel_ranges.loop(images, bits)
    results = [dict(scale=scale.tolist(), zero_point=zero.tolist()) for scale, zero in (mine, other)]
    errors = [channel_ranges.errors(images, result, bits) for result in results]
    assert errors[0].sum() <= 1.01 * errors[1].sum()
    assert ((mine[0] / other[0] - 1).abs() < 0.01).float().mean() > 0.8


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='peak memory is read from /proc')
@pytest.mark.parametrize('worse', [False, True])
def test_table_and_check(monkeypatch, capsys, worse):

    def measured(method, *arguments):
        result = channel_ranges.measure(method, *arguments)  # here: starting Python takes seconds
        result['scale'] = [2 * scale if method == 'ours' else scale for scale in result['scale']]
        return result

    if worse:
        monkeypatch.setattr(channel_ranges, 'measure_apart', measured)
    small = '--quick --images 2 --tokens 300 --channels 5 --bits 4'
    monkeypatch.setattr(sys, 'argv', ['channel_ranges.py', *small.split(), '--threads', str(torch.get_num_threads())])
    assert channel_ranges.main() == int(worse)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f'torch {torch.__version__}, threads: ')
    assert lines[0].endswith('best of 1, 2 images x 300 tokens x 5 channels')
    assert [line.split()[:2] for line in lines[2:4]] == [['4', 'ours'], ['4', 'loop']]
    assert lines[3].count('x') == 2 and 'squared error' in lines[4]
