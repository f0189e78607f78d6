"""Values of every kind in types that JSON and a restricted ``torch.load`` know."""

import json
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from psaq_mm.errors import first_of, nearest
from psaq_mm.plain import to_plain

NAN = float('nan')


@pytest.mark.parametrize(
    'value, expected',
    [
        (None, None),
        (True, True),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.str_('dog'), 'dog'),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        (np.array(7), 7),
        (torch.tensor(2.5, dtype=torch.bfloat16), 2.5),
        (torch.ones(1, 2, dtype=torch.int64), [[1, 1]]),
        (OrderedDict({1: (1, 2), 'b': [torch.tensor([True])]}), {'1': [1, 2], 'b': [[True]]}),
        ({3, 1, 2}, [1, 2, 3]),
        (frozenset('ba'), ['a', 'b']),
        (Path('a/b.pth'), 'a/b.pth'),
        (torch.nn.Linear, 'torch.nn.modules.linear.Linear'),
        (complex(1, 2), '(1+2j)'),
    ],
)
def test_each_kind(value, expected):
    result = to_plain(value)
    assert result == expected and type(result) is type(expected)
    assert json.loads(json.dumps(result)) == expected
    assert to_plain(result) == result


def test_numbers_wider_than_pythons_are_text():
    assert '0.5' in to_plain(np.longdouble(0.5))


def test_not_a_number_stays_or_becomes_none():
    value = {'a': [NAN, 1.0, float('inf')], 'b': torch.tensor([NAN])}
    assert json.dumps(to_plain(value)) == '{"a": [NaN, 1.0, Infinity], "b": [NaN]}'
    assert json.dumps(to_plain(value, nan=False), allow_nan=False) == '{"a": [null, 1.0, null], "b": [null]}'


def test_what_torch_saves_keeps_tuples_and_keys():
    value = {'classes': ('cat', np.str_('dog')), 'palette': [(1, np.uint8(2), 3)], 'names': {np.int64(0): 'cat'}}
    expected = {'classes': ('cat', 'dog'), 'palette': [(1, 2, 3)], 'names': {0: 'cat'}}
    result = to_plain(value, tuples=True)
    assert result == expected and all(type(key) is int for key in result['names'])


def test_convert_sees_every_value_first():
    assert to_plain([1, {'a': torch.tensor([2, 3])}], lambda v: v * 10 if isinstance(v, int) else v) == [
        10,
        {'a': [20, 30]},
    ]


def test_names_in_messages():
    assert nearest('bset', ['fast', 'best']) == 'did you mean best? Known are fast, best'
    assert nearest('zzz', iter(['fast', 'best'])) == 'use one of fast, best'
    assert first_of(['a', 'b', 'c']) == 'a, b, c' and first_of(['a', 'b', 'c', 'd'], 2) == 'a, b and 2 more'
