"""Settings: defaults, JSON round trip, and messages that name the value and the way out."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psaq_mm.errors import SpecError
from psaq_mm.quantization import LayerSpec, Override, QuantSpec

BITS = st.integers(2, 8)
NAMES = st.sampled_from(['minmax', 'percentile', 'mse'])
OVERRIDES = st.one_of(
    st.builds(Override, pattern=st.text(min_size=1), w_bits=BITS, a_bits=st.none() | BITS),
    st.builds(Override, pattern=st.text(min_size=1), float_=st.just(True)),
)
SPECS = st.builds(
    QuantSpec,
    w_bits=BITS,
    a_bits=BITS,
    scope=st.sampled_from(['backbone', 'full']),
    points=st.sampled_from(['gemm', 'linear']),
    quantize_softmax=st.booleans(),
    input_bits=BITS,
    w_symmetric=st.booleans(),
    w_observer=NAMES,
    a_observer=NAMES,
    overrides=st.lists(OVERRIDES, max_size=3),
)


@given(SPECS)
def test_round_trips(spec):
    assert QuantSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert QuantSpec.from_dict(spec.to_dict()) == spec
    assert QuantSpec.parse(spec.to_dict()) == spec
    assert QuantSpec.parse(spec) is spec
    assert hash(spec) == hash(QuantSpec.from_dict(json.loads(json.dumps(spec.to_dict()))))
    json.dumps(spec.to_dict())


@given(BITS, BITS, st.sampled_from(['w{}a{}', 'W{}A{}', 'w{}A{}']))
def test_presets(w_bits, a_bits, form):
    spec = QuantSpec.parse(form.format(w_bits, a_bits))
    assert spec == QuantSpec(w_bits=w_bits, a_bits=a_bits)
    assert spec.label == f'W{w_bits}A{a_bits}'


def test_dict_over_preset():
    spec = QuantSpec.parse(dict(preset='w4a8', a_bits=6, scope='full', overrides=[{'pattern': 'head', 'float': True}]))
    assert (spec.w_bits, spec.a_bits, spec.scope) == (4, 6, 'full')
    assert spec.overrides == (Override('head', float_=True),)


class DictSubclass(dict):
    """Stands for a config library's dict."""


def test_dict_subclasses_are_read():
    spec = QuantSpec.parse(DictSubclass(w_bits=4, overrides=[DictSubclass(pattern='a', w_bits=8)]))
    assert spec == QuantSpec(w_bits=4, overrides=(Override('a', w_bits=8),))


@pytest.mark.parametrize(
    'given_, message',
    [
        (dict(w_bits=9), 'w_bits=9 .*2 to 8'),
        (dict(a_bits=1), 'a_bits=1 .*2 to 8'),
        (dict(a_bits='8'), "a_bits='8'"),
        (dict(w_bits=True), 'w_bits=True'),
        (dict(input_bits=None), 'input_bits=None'),
        (dict(w_bit=4), "'w_bit' .*did you mean w_bits"),
        (dict(zzz=4), "'zzz' .*use one of w_bits"),
        (dict(scope='backbon'), 'did you mean backbone'),
        (dict(scope='all'), "scope='all'.*backbone, full"),
        (dict(points='everything'), "points='everything'"),
        (dict(w_observer='min_max'), 'did you mean minmax'),
        (dict(a_observer=3), 'a_observer=3'),
        (dict(quantize_softmax=1), 'quantize_softmax=1 .*True or False'),
        (dict(overrides='head'), "overrides='head'"),
        (dict(overrides=['head']), "'head' is no override"),
        (dict(overrides=[dict(w_bits=8)]), 'lacks its pattern'),
        (dict(overrides=[dict(pattern='', w_bits=8)]), "pattern=''"),
        (dict(overrides=[dict(pattern='head')]), "'head' changes nothing"),
        (dict(overrides=[dict(pattern='head', float=True, w_bits=8)]), 'asks for float and for bits'),
        (dict(overrides=[dict(pattern='head', w_bits=0)]), 'w_bits=0'),
        (dict(overrides=[dict(pattern='head', bits=8)]), "'bits' .*did you mean"),
        (dict(preset='w8'), "'w8' is no preset"),
        (dict(preset='w4a4', scop='full'), 'did you mean scope'),
        ('int8', "'int8' is no preset"),
        ('w9a8', 'w_bits=9'),
        (None, 'quant=None'),
        (8, 'quant=8'),
    ],
)
def test_bad_settings_get_one_clear_sentence(given_, message):
    with pytest.raises(SpecError, match=message) as error:
        QuantSpec.parse(given_)
    assert '\n' not in str(error.value) and str(error.value).endswith('.')


def test_resolve_applies_overrides_in_order():
    spec = QuantSpec(
        w_bits=4,
        a_bits=4,
        w_observer='mse',
        overrides=(Override('layers.*', w_bits=6), Override('*.fc2', float_=True), Override('layers.1.fc2', a_bits=8)),
    )
    assert spec.resolve('head') == LayerSpec(4, 4, True, 'mse', 'minmax')
    assert spec.resolve('layers.0.fc1') == LayerSpec(6, 4, True, 'mse', 'minmax')
    assert spec.resolve('layers.0.fc2') is None
    assert spec.resolve('layers.1.fc2') == LayerSpec(6, 8, True, 'mse', 'minmax')


def test_first_layer_gets_the_input_bits_unless_overridden():
    assert QuantSpec.parse('w4a4').resolve('patch_embed', is_input=True).a_bits == 8
    spec = QuantSpec(a_bits=4, overrides=(Override('patch_embed', a_bits=6),))
    assert spec.resolve('patch_embed', is_input=True).a_bits == 6


def test_specs_are_frozen():
    with pytest.raises(AttributeError):
        QuantSpec().w_bits = 4


def test_a_recipe_may_differ_below_eight_bits():
    assert QuantSpec.parse('psaq_v2_w8a8').w_symmetric and not QuantSpec.parse('psaq_v2_w4a8').w_symmetric
    assert QuantSpec.parse(dict(preset='psaq_v2_w4a8', w_symmetric=True)).w_symmetric, 'what is given goes first'


@pytest.mark.parametrize('kind', ['log2', 'log_sqrt2'])
@pytest.mark.parametrize('off', [dict(quantize_softmax=False), dict(points='linear')])
def test_a_softmax_quantizer_without_a_softmax_to_quantize_is_refused(kind, off):
    for settings in (dict(softmax_quantizer=kind, **off), dict(preset='repq_w4a4', softmax_quantizer=kind, **off)):
        with pytest.raises(SpecError, match=f"softmax_quantizer='{kind}' contradicts {next(iter(off))}"):
            QuantSpec.parse(settings)
    # A preset's own choice gives way, and a file from before says what it said.
    wanted = QuantSpec.parse(dict(preset='repq_w4a4', softmax_quantizer='affine', **off))
    assert QuantSpec.parse(dict(preset='repq_w4a4', **off)) == wanted
    assert QuantSpec.from_dict({**wanted.to_dict(), 'softmax_quantizer': kind}) == wanted
    assert QuantSpec(points='all', softmax_quantizer=kind).softmax_quantizer == kind


def test_a_reduced_range_is_of_weights_of_8_bits():
    spec = QuantSpec.parse(dict(preset='w8a8', w_reduce_range=True, overrides=[dict(pattern='head*', w_bits=4)]))
    assert QuantSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec and spec.label == 'W8A8 (7-bit weights)'
    assert spec.resolve('fc').w_bits == 7 and spec.resolve('fc').w_reduce_range
    assert spec.resolve('head').w_bits == 4 and not spec.resolve('head').w_reduce_range
    before = {k: v for k, v in spec.to_dict().items() if k != 'w_reduce_range'}
    assert QuantSpec.from_dict(before) == QuantSpec.parse(dict(before, w_reduce_range=False)), (
        'specs from before it have none'
    )
    few = QuantSpec.parse(dict(preset='w4a8', w_reduce_range=True, overrides=[dict(pattern='patch_embed*', w_bits=8)]))
    assert few.resolve('patch_embed.projection').w_bits == 7 and few.resolve('fc').w_bits == 4 and few.label == 'W4A8'
    with pytest.raises(
        SpecError, match='w_reduce_range=True has nothing to do with w_bits=4: .*leave it out, or set w_bits=8'
    ):
        QuantSpec.parse(dict(preset='w4a8', w_reduce_range=True))
    with pytest.raises(SpecError, match='w_reduce_range=1 is not a truth value'):
        QuantSpec.parse(dict(preset='w8a8', w_reduce_range=1))


# ---------------------------------------------------------------------- target
def test_a_target_makes_activations_symmetric_and_is_told():
    spec = QuantSpec.parse(dict(preset='w8a8', target='tensorrt', overrides=[dict(pattern='head*', w_bits=4)]))
    assert QuantSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec and spec.label == 'W8A8 (TensorRT)'
    assert spec.resolve('fc').a_symmetric and spec.resolve('head').a_symmetric and spec.resolve('fc').w_symmetric
    reduced = QuantSpec.parse(dict(preset='w8a8', target='tensorrt', w_reduce_range=True))
    assert reduced.label == 'W8A8 (7-bit weights, TensorRT)'
    plain = QuantSpec.parse('w8a8')
    assert plain.target == 'default' and not plain.resolve('fc').a_symmetric
    assert QuantSpec.parse(dict(preset='w8a8', target=None)) == plain
    before = {k: v for k, v in plain.to_dict().items() if k != 'target'}
    assert QuantSpec.from_dict(before) == plain, 'a student from before the setting'


def test_a_preset_gives_way_to_the_target():
    """Asymmetric weights of few bits are stored without their zero points, those of 8 bits cannot be."""
    repq = QuantSpec.parse(dict(preset='repq_w8a8', target='tensorrt'))
    assert repq.w_symmetric and repq.softmax_quantizer == 'affine' and repq.reparameterize and repq.quantize_softmax
    few = QuantSpec.parse(dict(preset='psaq_v2_w4a8', target='tensorrt', overrides=[dict(pattern='head*', w_bits=8)]))
    assert not few.resolve('fc').w_symmetric and few.resolve('head').w_symmetric and few.quantize_softmax
    edges = QuantSpec.parse(dict(preset='psaq_v1_w8a8', target='tensorrt'))
    assert edges.points == 'all' and not edges.quantize_softmax
    own = QuantSpec.parse(dict(preset='psaq_v2_w8a8', target='tensorrt', quantize_softmax=False))
    assert not own.quantize_softmax, 'what is given goes first'


@pytest.mark.parametrize(
    'given_, message',
    [
        (dict(target='tensor_rt'), "target='tensor_rt' .*did you mean tensorrt"),
        (dict(target='tensorrt', a_bits=4), "a_bits=4 contradicts target='tensorrt'"),
        (dict(target='tensorrt', input_bits=6), "input_bits=6 contradicts target='tensorrt'"),
        (
            dict(target='tensorrt', overrides=[dict(pattern='head', a_bits=6)]),
            "a_bits of the override 'head'=6 contradicts",
        ),
        (dict(target='tensorrt', softmax_quantizer='log2'), "softmax_quantizer='log2' contradicts"),
        (dict(target='tensorrt', preset='repq_w8a8', softmax_quantizer='log_sqrt2'), 'log_sqrt2.* contradicts'),
        (dict(target='tensorrt', w_symmetric=False), 'w_symmetric=False contradicts'),
    ],
)
def test_what_contradicts_the_target_is_refused(given_, message):
    with pytest.raises(SpecError, match=message) as error:
        QuantSpec.parse(given_)
    assert '\n' not in str(error.value) and str(error.value).endswith('.')
