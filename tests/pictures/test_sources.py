# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Sources: the same pictures by number whatever is drawn beside them, and the statistics that they promise."""

import math

import pytest
import torch
from toys import ToyTransformer

from psaq_mm.errors import ConfigError, DataError
from psaq_mm.pictures import (
    SOURCES,
    DeadLeaves,
    GaussianNoise,
    Generated,
    ImageSpec,
    Mixture,
    PinkNoise,
    SampleStream,
    Scenes,
    Source,
    of_rank,
    register_source,
    source_names,
    source_of,
)
from psaq_mm.pictures.base import mixed, number_seed
from psaq_mm.pictures.noise import blurred
from psaq_mm.psaq_vit import SampleGenerator

IMAGENET = ImageSpec((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
WIDE = ImageSpec((127.5,) * 3, (26.0,) * 3)  # keeps values up to 4.9 standard units
PROCEDURAL = {
    'gaussian': GaussianNoise(),
    'pink': PinkNoise(exponent=(0.8, 1.4)),
    'leaves': DeadLeaves(),
    'scenes': Scenes(),
    'mixture': Mixture([PinkNoise(), DeadLeaves()], [2, 1]),
}
sources = pytest.mark.parametrize('source', PROCEDURAL.values(), ids=PROCEDURAL)


# ---------------------------------------------------------------------- the same pictures
@sources
def test_a_picture_depends_on_seed_and_number_alone(source):
    whole = source.draw(range(5), (24, 30), IMAGENET, seed=3)
    assert torch.equal(whole, source.draw(range(5), (24, 30), IMAGENET, seed=3))
    for number in (4, 0, 2):
        assert torch.equal(source.draw([number], (24, 30), IMAGENET, seed=3)[0], whole[number])
    assert torch.equal(source.draw([3, 1], (24, 30), IMAGENET, seed=3), whole[[3, 1]])
    assert len({tuple(picture.flatten()[:50].tolist()) for picture in whole}) == 5
    other = source.draw(range(5), (24, 30), IMAGENET, seed=4)
    assert not any(torch.equal(a, b) for a, b in zip(whole, other))


@sources
def test_ranks_together_draw_what_one_draws(source):

    def stream():
        return SampleStream(source, (16, 20), IMAGENET, seed=1)

    one, ranks = stream(), [stream() for _ in range(3)]
    for count in (6, 4, 3):
        parts = [own.take(count, rank=rank, world_size=3) for rank, own in enumerate(ranks)]
        assert torch.equal(torch.cat(parts), one.take(count)) and [len(part) for part in parts][-1] in (1, 2)
    assert {own.position for own in ranks} == {one.position} == {13}


@sources
def test_global_random_state_does_not_matter(source):
    state = torch.get_rng_state()
    first = source.draw(range(2), (40, 24), IMAGENET)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert torch.equal(source.draw(range(2), (40, 24), IMAGENET), first)


@pytest.mark.parametrize(
    'source',
    [GaussianNoise(), PinkNoise(), DeadLeaves(), Scenes()],
    ids=lambda source: type(source).__name__,
)
@pytest.mark.parametrize('channels', [1, 3])
def test_threads_do_not_matter(source, channels):
    """Also of pictures that PyTorch splits among threads, which it does from 32768 values on."""
    threads, found = torch.get_num_threads(), {}
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert torch.get_num_threads() == count
            found[count] = source.draw(range(2), (200, 240), ImageSpec(channels=channels), seed=1)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[1], found[2])


def test_a_stream_goes_on_where_its_state_was():
    stream = SampleStream(PinkNoise(), (8, 8), IMAGENET, seed=2)
    stream.take(3)
    state, following = stream.state_dict(), stream.take(4)
    again = SampleStream(PinkNoise(), (8, 8), IMAGENET, seed=2)
    again.load_state_dict(state)
    assert torch.equal(again.take(4), following)
    named = SampleStream(PinkNoise(), (8, 8), IMAGENET, seed=2, name='fresh')
    assert not torch.equal(named.take(3), SampleStream(PinkNoise(), (8, 8), IMAGENET, seed=2).take(3))


def test_no_two_numbers_share_a_seed():
    assert len({number_seed(7, number) for number in range(20000)}) == 20000
    assert len({mixed(a, b) for a in range(50) for b in range(50)}) == 2500


def test_a_source_that_is_called_draws_under_a_seed_of_the_generator():
    generator = torch.Generator().manual_seed(0)
    first, second = (DeadLeaves()(2, (16, 16), IMAGENET, generator=generator) for _ in range(2))
    assert not torch.equal(first, second)
    seed = int(torch.randint(0, 2**62, (), generator=torch.Generator().manual_seed(0)))
    assert torch.equal(first, DeadLeaves().draw(range(2), (16, 16), IMAGENET, seed))


@pytest.mark.parametrize(
    'name, spelled',
    [
        ('gaussian', dict(type='psaq_mm.GaussianNoise')),
        ('pink', dict(type='PinkNoise')),
        ('dead_leaves', dict(type='DeadLeaves')),
        ('scenes', dict(type='psaq_mm.Scenes')),
        ('mixture', [dict(type='PinkNoise'), dict(type='DeadLeaves')]),
    ],
)
def test_a_name_and_its_class_give_the_same_pictures(name, spelled):
    """Out of a random generator, as a synthesis begins, and by number."""
    sources = source_of(name), source_of(spelled)
    assert torch.equal(*(source(3, (16, 20), IMAGENET, torch.Generator().manual_seed(1)) for source in sources))
    assert torch.equal(*(source.draw([4, 1], (16, 20), IMAGENET, 7) for source in sources))
    makers = [
        SampleGenerator(size=(8, 12), batch_size=2, steps=1, lr=1e-9, drop_tokens=1, init=init)
        for init in (name, spelled)
    ]
    begun = [maker.generate(ToyTransformer(), IMAGENET).samples for maker in makers]
    assert torch.equal(*begun)


# ---------------------------------------------------------------------- ranges, sizes, channels
@sources
@pytest.mark.parametrize(
    'spec', [IMAGENET, ImageSpec(channels=1), ImageSpec(channels=4), ImageSpec((0.5,) * 3, (0.25,) * 3, max_value=1.0)]
)
@pytest.mark.parametrize('size', [(7, 33), (1, 1), (32, 48)])
def test_any_size_and_number_of_channels_within_the_range(source, spec, size):
    made = source.draw(range(3), size, spec)
    assert made.shape == (3, spec.channels, *size) and made.dtype == torch.float32 and made.isfinite().all()
    assert torch.equal(spec.clamp(made), made)


@sources
def test_pictures_use_the_range_in_standard_units(source):
    values = IMAGENET.to_standard(source.draw(range(6), (64, 64), IMAGENET))
    assert 0.6 < float(values.std()) < 1.3 and abs(float(values.mean())) < 0.35


@sources
def test_bad_counts_and_sizes_are_named(source):
    with pytest.raises(DataError, match='must be positive'):
        source.draw([], (8, 8), IMAGENET)
    with pytest.raises(DataError, match='must be positive'):
        source.draw([0], (8, 0), IMAGENET)


# ---------------------------------------------------------------------- noise
def power_of(planes, low=4, high=40):
    """Slope of log amplitude over log frequency, and of each axis alone; planes (n, N, N)."""
    size = planes.shape[-1]
    spectrum = torch.fft.rfft2(planes).abs().square().mean(0).sqrt()
    rows = torch.fft.fftfreq(size).mul(size).unsqueeze(1).expand_as(spectrum)
    columns = torch.fft.rfftfreq(size).mul(size).expand_as(spectrum)
    radius = (rows.square() + columns.square()).sqrt()

    def slope(chosen):
        x, y = radius[chosen].log(), spectrum[chosen].log()
        x = x - x.mean()
        return float((x * y).sum() / x.square().sum())

    band = (radius >= low) & (radius <= high)
    return slope(band), slope(band & (rows == 0)), slope(band & (columns == 0))


@pytest.mark.parametrize('exponent', [0.0, 0.7, 1.0, 1.8])
def test_amplitude_falls_as_the_exponent_says_in_every_direction(exponent):
    noise = PinkNoise(exponent, color_correlation=0.0).draw(range(24), (96, 96), WIDE)
    for found, tolerance in zip(power_of(noise.flatten(0, 1)), (0.05, 0.15, 0.15)):
        assert found == pytest.approx(-exponent, abs=tolerance)


@pytest.mark.parametrize('size', [(96, 96), (95, 95)])
def test_no_frequency_stands_out(size):
    """Columns that are their own mirror image have the amplitude of their neighbours."""
    noise = PinkNoise(0.0, color_correlation=0.0).draw(range(48), size, WIDE).flatten(0, 1)
    columns = torch.fft.rfft2(noise).abs().square().mean((0, 1)).sqrt()
    assert float(columns[[0, -1]].div(columns[1:-1].mean()).sub(1).abs().max()) < 0.05


@pytest.mark.parametrize('correlation', [0.0, 0.5, 0.9, 1.0])
def test_any_two_channels_correlate_as_asked(correlation):
    noise = PinkNoise(0.0, correlation).draw(range(8), (64, 64), WIDE)
    found = torch.corrcoef(noise.transpose(0, 1).flatten(1))
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert float(found[one, other]) == pytest.approx(correlation, abs=0.03)
    assert float(noise.std()) == pytest.approx(1, abs=0.03)


def test_each_picture_has_an_exponent_of_its_own():
    noise = PinkNoise((0.2, 2.0), 0.0).draw(range(12), (64, 64), WIDE)
    slopes = [power_of(picture)[0] for picture in noise]
    assert max(slopes) - min(slopes) > 0.8 and -2.2 < min(slopes) and max(slopes) < 0


# ---------------------------------------------------------------------- mixtures
@pytest.mark.parametrize('weights', [(1, 1), (3, 1), (1, 2, 5)])
def test_every_batch_has_the_proportions(weights):
    mixture = Mixture([PinkNoise(seed=s) for s in range(len(weights))], weights)
    for seed in range(3):
        for start in (0, 7, 1000):
            chosen = mixture.members(range(start, start + 64), seed)
            for index, weight in enumerate(weights):
                assert abs(int((chosen == index).sum()) - 64 * weight / sum(weights)) <= 2


def test_a_mixture_draws_each_picture_from_its_member():
    members = [GaussianNoise(), DeadLeaves()]
    mixture = Mixture(members)
    whole, chosen = mixture.draw(range(6), (12, 12), IMAGENET, seed=5), mixture.members(range(6), 5)
    assert set(chosen.tolist()) == {0, 1}
    for number, member in enumerate(chosen.tolist()):
        assert torch.equal(whole[number], members[member].draw([number], (12, 12), IMAGENET, mixed(5, 0))[0])


def test_nested_mixtures_and_weights_of_zero():
    nested = Mixture([Mixture([PinkNoise(), DeadLeaves()], [1, 3]), GaussianNoise()], [1, 1])
    assert nested.weights == [0.125, 0.375, 0.5] and [type(s) for s in nested.sources] == [
        PinkNoise,
        DeadLeaves,
        GaussianNoise,
    ]
    assert set(Mixture([PinkNoise(), DeadLeaves(), GaussianNoise()], [1, 0, 1]).members(range(200)).tolist()) == {0, 2}


def test_generated_samples_take_their_place_in_a_mixture():
    mixture, asked = Mixture([GaussianNoise(), Generated()]), []

    def generated(count):
        asked.append(count)
        return torch.full((count, 3, 8, 8), 7.0)

    whole = mixture.draw(range(10), (8, 8), IMAGENET, generated=generated)
    chosen = mixture.members(range(10))
    assert (
        asked == [int((chosen == 1).sum())]
        and bool((whole[chosen == 1] == 7).all())
        and not bool((whole[chosen == 0] == 7).any())
    )
    assert not mixture.procedural and [type(s) for s in mixture.procedural_part().sources] == [GaussianNoise]
    assert Mixture([Generated()]).procedural_part() is None
    with pytest.raises(DataError, match='made by a run'):
        mixture.draw(range(10), (8, 8), IMAGENET)


# ---------------------------------------------------------------------- configs
def test_names_dicts_lists_and_sources():
    assert type(source_of('dead_leaves')) is DeadLeaves
    assert {'gaussian', 'pink', 'dead_leaves', 'scenes', 'mixture', 'generated'} <= set(source_names())
    pink = source_of(dict(type='psaq_mm.PinkNoise', exponent=1.5, weight=2))
    assert pink.exponent == (1.5, 1.5) and source_of(pink) is pink
    mixture = source_of([dict(type='PinkNoise', weight=3), dict(type='psaq_mm.DeadLeaves'), 'gaussian'])
    assert mixture.weights == [0.6, 0.2, 0.2]
    spelled = source_of(dict(type='psaq_mm.Mixture', sources=['pink', dict(type='DeadLeaves')], weights=[3, 1]))
    assert spelled.weights == [0.75, 0.25]


def test_a_source_of_ones_own_is_a_picture_in_standard_units(monkeypatch):
    monkeypatch.setattr('psaq_mm.pictures.registry.SOURCES', dict(SOURCES))

    @register_source('grey')
    class Grey(Source):
        def picture(self, size, image_spec, generator):
            return torch.zeros(image_spec.channels, *size)

    made = source_of(['grey', Grey(seed=1), dict(type='psaq_mm.Grey')]).draw(range(2), (4, 4), ImageSpec())
    assert torch.equal(made, torch.full((2, 3, 4, 4), 127.5))


@pytest.mark.parametrize(
    'given, error, match',
    [
        ('pnk', ConfigError, 'did you mean pink'),
        (dict(exponent=1), ConfigError, 'lacks its type'),
        (dict(type='psaq_mm.PinkNois'), ConfigError, 'did you mean PinkNoise'),
        (dict(type='PinkNoise', spectrum=1), ConfigError, 'spectrum'),
        (3, ConfigError, '3 is no source'),
        ([], DataError, 'at least one source'),
        ([dict(type='PinkNoise', weight=-1)], DataError, r'weights=\[-1.0\]'),
        ([dict(type='PinkNoise', weight=0)], DataError, 'above 0'),
        (dict(type='PinkNoise', exponent=(2, 1)), DataError, r'exponent=\(2, 1\)'),
        (dict(type='PinkNoise', color_correlation=1.1), DataError, 'color_correlation=1.1'),
        (dict(type='DeadLeaves', radius=(0.1, 0.4)), DataError, 'radius='),
        (dict(type='DeadLeaves', radius=(3, 0.6)), DataError, 'at most 0.5'),
        (dict(type='DeadLeaves', texture=0.6), ConfigError, 'texture of DeadLeaves can no longer be set'),
        (dict(type='psaq_mm.Scenes', objects=(3, 16)), ConfigError, 'objects of Scenes can no longer be set'),
        (dict(type='Scenes', radius=(0, 0.2)), DataError, 'radius='),
        (['pink', dict(type='Mixture', sources=['bronw'])], ConfigError, "'bronw' is no source"),
        (dict(type='DeadLeaves', exponent=math.inf), DataError, 'exponent=inf'),
    ],
)
def test_mistakes_are_named(given, error, match):
    with pytest.raises(error, match=match):
        source_of(given)


def test_there_is_no_such_rank():
    with pytest.raises(DataError, match='rank=2'):
        of_rank(range(4), 2, 2)


# ---------------------------------------------------------------------- the start of the synthesis
@pytest.mark.parametrize(
    'init', ['dead_leaves', dict(type='psaq_mm.DeadLeaves', exponent=1), [dict(type='PinkNoise'), 'dead_leaves']]
)
def test_synthesis_begins_with_a_source(init):
    maker = SampleGenerator(size=(24, 32), batch_size=2, steps=1, lr=1e-9, jitter=0, flip=0.0, drop_tokens=1, init=init)
    made = maker.generate(ToyTransformer(), IMAGENET, generator=torch.Generator().manual_seed(4)).samples
    first = source_of(maker.init)(2, (24, 32), IMAGENET, torch.Generator().manual_seed(4))
    torch.testing.assert_close(made, first, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    'init, error',
    [
        ('generated', DataError),
        (dict(type='psaq_mm.Generated'), DataError),
        ([], DataError),
        (dict(type='Nothing'), ConfigError),
    ],
)
def test_what_synthesis_cannot_begin_with(init, error):
    with pytest.raises(error):
        SampleGenerator(init=init)


# ---------------------------------------------------------------------- colour coarser than brightness
@pytest.mark.parametrize('kind', [DeadLeaves, Scenes])
def test_colour_is_softened_and_brightness_is_not(kind):
    # nothing is cut off yet
    sharp, soft = (kind(color_blur=side).pictures(range(4), (64, 48), IMAGENET, 0) for side in (1, 5))
    torch.testing.assert_close(soft.mean(1), sharp.mean(1), rtol=0, atol=1e-4)
    before, after = (steps(made - made.mean(1, keepdim=True)) for made in (sharp, soft))
    assert after < 0.7 * before, 'differences of neighbours'
    assert torch.equal(kind(color_blur=5).pictures([2], (64, 48), IMAGENET, 0)[0], soft[2])


def steps(made):
    return float((made[..., 1:] - made[..., :-1]).abs().mean())


@pytest.mark.parametrize('kind', [DeadLeaves, Scenes])
def test_softening_leaves_grey_pictures_and_small_ones(kind):
    grey = ImageSpec((127.5,), (50.0,))
    assert torch.equal(kind(color_blur=9).draw(range(2), (20, 20), grey), kind().draw(range(2), (20, 20), grey))
    assert kind(color_blur=9).draw(range(2), (2, 1), IMAGENET).isfinite().all()


@pytest.mark.parametrize('side', [0, 4, -3, 101, 2.5, True])
def test_a_side_that_is_no_odd_number_is_named(side):
    with pytest.raises(DataError, match=f'color_blur={side}'):
        source_of(dict(type='psaq_mm.DeadLeaves', color_blur=side))


def test_means_over_squares_are_those_of_a_pooling():
    picture = torch.rand(2, 9, 11, generator=torch.Generator().manual_seed(0))
    pooled = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(picture, (1,) * 4, mode='replicate'), 3, 1)
    torch.testing.assert_close(blurred(picture, 3), pooled)
    assert blurred(picture, 1) is picture
