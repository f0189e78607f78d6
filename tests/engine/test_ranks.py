"""Two ranks with half of each batch, against one rank with the whole: through the command lines, and part by part."""

import copy
import json
import shutil

import pytest
import torch
from classifier_models import SIZES, build_classifier
from tiny_classifier import ClassifierProject
from two_ranks import on_two_ranks, ranks_of_tool, spied, tool

from psaq_mm.calibration import Calibration, CalibrationSettings, StudentTraining, TrainingSettings
from psaq_mm.commands.dfq_train import main as dfq_train
from psaq_mm.commands.test import main as evaluate_command
from psaq_mm.engine.checkpoint import read_checkpoint
from psaq_mm.models import TaskModel
from psaq_mm.pictures import ImageSpec, SampleStream, Source, source_of
from psaq_mm.psaq_vit import CoEvolution, SampleGenerator, Synthesis, SynthesisSettings
from psaq_mm.quantization import set_mode
from psaq_mm.ranks import ranks, sum_gradients_
from psaq_mm.settings import read_groups

pytestmark = pytest.mark.filterwarnings('ignore')

NAME = 'timm-vit'
SIZE = (SIZES[NAME],) * 2
TOLERANCE = 1e-4
EXACT = 1e-7
"""In double precision: of samples, ranges and losses only a float32 rounding may differ."""


def relative(found, expected):
    """Norm of the difference, in norms of what is expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-12))


def weights(state):
    """All weights of a state dict, as one vector."""
    return torch.cat([v.flatten().double() for k, v in state.items() if 'quantizer' not in k])


# ---------------------------------------------------------------------- part by part
CASES = dict(
    generated=dict(),
    classes=dict(classes='random', logits_weight=0.5, evolve_every=0),
    compensated=dict(rounding='compensated', source='pink'),
    guided=dict(rounding='guided', source='pink'),
    few=dict(calibration_samples=1, evolve_samples=1),
    real=dict(),
    mixture=dict(),
    accumulated=dict(),
    uneven=dict(source='pink', calibration_samples=3, pool_size=3, evolve_samples=1),
)


BATCHES = ('accumulated', 'uneven')
"""Cases whose steps are made of two batches each."""


class Pictures(Source):
    """Stands for a training set: picture by number."""

    def draw(self, numbers, size, image_spec, seed=0, generated=None):
        return torch.stack([torch.randn(3, *size, generator=torch.Generator().manual_seed(n)) for n in numbers])


def in_double(model):
    """The model with weights in double precision, for images in float32.

    In float32 two orders of one sum differ in the last digit, a value next to an edge gets the neighbouring code, and a
    few steps make thousandths of a tensor out of that, on any number of ranks. In double no value is so close, and what
    is left is the ranks' doing.
    """
    model.double()
    (patch_embed,) = (module for name, module in model.named_modules() if name.endswith('patch_embed'))
    patch_embed.register_forward_pre_hook(lambda module, images: (images[0].double(),))
    return model


def evolution_of(case):
    """What one rank with batches of 4 has, or each of two with batches of 2."""
    student = in_double(build_classifier(NAME, quant=dict(preset='w4a8', scope='full', a_observer='percentile')))
    teacher = copy.deepcopy(student)
    set_mode(teacher, 'off')
    teacher.requires_grad_(False)
    teacher, student = (TaskModel(m, ('blocks',), block_stride=1) for m in (teacher, student))
    batch, given = 4 // ranks()[1], dict(CASES[case])
    source, classes = given.pop('source', 'generated'), SynthesisSettings(classes=given.pop('classes', None))
    common = dict(batch_size=batch // 2 if case in BATCHES else batch, calibration_samples=6)
    steps = dict(evolve_samples=5, evolve_every=2, pool_size=8)
    settings, training = read_groups({**common, **steps, **given}, CalibrationSettings, TrainingSettings)
    random = torch.Generator().manual_seed(0)
    calibration = Calibration(student, settings, scope='full', random=random)
    sources = dict(mixture=['pink', 'generated'], real=Pictures())
    source = source_of(sources.get(case, source))
    stream = SampleStream(source, SIZE, ImageSpec(), 0)
    if source.procedural:
        fresh = SampleStream(source, SIZE, ImageSpec(), 0, 'fresh') if case in ('real', 'compensated') else None
        return StudentTraining(teacher, calibration, stream, training, fresh=fresh)
    maker = SampleGenerator(size=SIZE, batch_size=batch, steps=2, jitter=4)
    synthesis = Synthesis(teacher, maker, SIZE, classes, random=random)
    return CoEvolution(teacher, calibration, stream, synthesis, training)


def evolved(case):
    """Pool and student after four steps, with a round of synthesis between."""
    evolution = evolution_of(case)
    evolution.prepare()
    student = evolution.student.model
    first = {k: v.clone() for k, v in student.state_dict().items()}
    optimizer = torch.optim.Adam(student.parameters(), 1e-4)
    losses = []
    for step in range(4):
        if evolution.due(step):
            evolution.evolve()
        batches = 2 if case in BATCHES else 1
        losses.append(torch.stack(evolution.learn(evolution.draw(batches), torch.Tensor.backward, batches)))
        sum_gradients_(student.parameters())
        optimizer.step()
        optimizer.zero_grad()
    synthesis = getattr(evolution, 'synthesis', None)
    return dict(
        losses=torch.stack(losses),
        first=first,
        last=student.state_dict(),
        pool=evolution.pool.samples,
        weight=synthesis and synthesis.weight.state_dict(),
        random=evolution.random.get_state(),
        made=evolution.fresh_samples,
        history=[{k: v for k, v in step.items() if k != 'step'} for step in (synthesis.history if synthesis else ())],
    )


def all_cases():
    return {case: evolved(case) for case in CASES}


@pytest.fixture(scope='module')
def halves(tmp_path_factory):
    build_classifier(NAME)  # where its library is absent the tests skip, and the ranks could only fail
    return on_two_ranks(all_cases, tmp_path_factory.mktemp('halves') / 'ranks')


@pytest.mark.parametrize('case', list(CASES))
def test_two_ranks_with_half_the_batch_are_one_with_the_whole(halves, case):
    expected, (one, other) = evolved(case), (rank[case] for rank in halves)
    for key in ('first', 'last'):
        for name, value in one[key].items():
            assert torch.equal(value, other[key][name]), name
    assert torch.equal(one['pool'], other['pool']) and torch.equal(one['losses'], other['losses'])
    assert one['weight'] == other['weight'] and one['history'] == other['history'] and one['made'] == expected['made']
    assert torch.equal(one['random'], expected['random'])

    assert relative(one['pool'], expected['pool']) <= EXACT
    torch.testing.assert_close(one['losses'], expected['losses'], rtol=EXACT, atol=0)
    assert len(one['history']) == len(expected['history'])
    for ours, theirs in zip(one['history'], expected['history']):
        assert ours == pytest.approx(theirs, rel=10 * EXACT), 'norms and losses of float32 samples'
    for key in ('first', 'last'):
        for name, value in expected[key].items():
            assert relative(one[key][name], value) <= EXACT, (key, name)
    moved = [
        n
        for n in expected['last']
        if 'quantizer' not in n and not torch.equal(expected['last'][n], expected['first'][n])
    ]
    assert len(moved) > 10
    steps = [weights(part['last']) - weights(part['first']) for part in (one, expected)]
    assert relative(*steps) <= EXACT


# ---------------------------------------------------------------------- command lines
def test_a_launched_command_ends_its_group_and_no_other_does(tmp_path):
    import argparse

    from psaq_mm.commands.common import add_run_arguments, run_command

    parser = argparse.ArgumentParser(prog='launched')
    add_run_arguments(parser)
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path / "store"}', rank=0, world_size=1)
    try:
        assert run_command(lambda args: None, parser, []) == 0 and torch.distributed.is_initialized()
        assert (
            run_command(lambda args: None, parser, ['--launcher', 'pytorch']) == 0
            and not torch.distributed.is_initialized()
        )
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


DFQ = dict(
    size=(32, 32),
    batch_size=4,
    calibration_samples=6,
    pool_size=10,
    evolve_every=2,
    evolve_samples=5,
    iters=4,
    save_samples=True,
    generator=dict(batch_size=4, steps=2),
)
HALF = dict(DFQ, batch_size=2, generator=dict(batch_size=2, steps=2))


@pytest.fixture(scope='module')
def project(tmp_path_factory):
    pytest.importorskip('mmpretrain')
    # 21 pictures: the ranks get 11 each, one of them twice
    project = ClassifierProject(tmp_path_factory.mktemp('ranks'), per_class=7)
    project.whole, project.half = project.folder / 'whole', project.folder / 'half'
    assert dfq_train([str(project.config('w8a8', 'whole.py', **DFQ)), '--work-dir', str(project.whole)]) == 0
    config = project.config('w8a8', 'half.py', **HALF)
    project.digests = spied(config)
    launcher = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', 'tools/dfq_train.py']
    launched = tool(launcher, [config, '--work-dir', project.half, '--launcher', 'pytorch'], project.folder)
    assert launched.wait(400) == 0, (project.folder / 'output.txt').read_text()[-3000:]
    return project


def pool_of(checkpoint):
    return checkpoint['psaq_mm']['evolution']['pool']['samples']


def test_torchrun_makes_the_samples_ranges_and_weights_of_one_rank(project):
    samples = [torch.load(work_dir / 'samples.pt')['samples'] for work_dir in (project.whole, project.half)]
    assert len(samples[0]) == 6 and relative(samples[1], samples[0]) <= TOLERANCE
    expected, found = (read_checkpoint(work_dir / 'iter_2.pth') for work_dir in (project.whole, project.half))
    assert relative(pool_of(found), pool_of(expected)) <= TOLERANCE
    assert relative(weights(found['state_dict']), weights(expected['state_dict'])) <= TOLERANCE
    # Tensor by tensor in float32: a code that lies next to an edge may fall on its other side, see in_double.
    for key, value in expected['state_dict'].items():
        assert relative(found['state_dict'][key], value) <= (TOLERANCE if 'quantizer' in key else 50 * TOLERANCE), key


def test_one_rank_goes_on_from_there_as_two_do(project):
    """The next round of synthesis, from one state: what competes with a quantized student magnifies the last digits of
    the steps before, on one rank as on two."""
    alone = project.folder / 'alone'
    alone.mkdir()
    shutil.copy(project.half / 'iter_2.pth', alone)
    assert dfq_train([str(project.folder / 'whole.py'), '--work-dir', str(alone), '--resume']) == 0
    expected, found = (read_checkpoint(work_dir / 'iter_4.pth') for work_dir in (alone, project.half))
    assert len(pool_of(found)) == 10 and relative(pool_of(found), pool_of(expected)) <= TOLERANCE
    assert relative(weights(found['state_dict']), weights(expected['state_dict'])) <= TOLERANCE
    for key, value in expected['state_dict'].items():
        assert 'quantizer' not in key or relative(found['state_dict'][key], value) <= TOLERANCE, key
    made = [
        read_checkpoint(work_dir / 'student.pth')['meta']['psaq_mm']['dfq']['ranks']
        for work_dir in (alone, project.half)
    ]
    assert made == [1, 2]


def test_weights_and_ranges_are_the_same_bits_on_both_ranks_at_every_step(project):
    lines = [project.digests(rank).read_text().splitlines() for rank in (0, 1)]
    assert len(lines[0]) == 4 and lines[0] == lines[1] and len(set(lines[0])) == 4


def test_rank_0_alone_writes(project):
    for pattern in ('*/*.log', '*/vis_data', 'samples/round_*.png'):
        assert len(list(project.half.glob(pattern))) == len(list(project.whole.glob(pattern))), pattern
    assert not list(project.half.glob('.*.partial'))


def test_two_ranks_evaluate_the_quantized_model_and_get_the_metric_of_one(project):
    config, student = project.folder / 'whole.py', project.whole / 'student.pth'
    assert (
        evaluate_command([str(config), str(student), '--work-dir', str(project.folder / 'one'), '--full-precision'])
        == 0
    )
    found = ranks_of_tool(
        'test', [config, student, '--work-dir', project.folder / 'two', '--full-precision'], project.folder
    )
    outputs = [project.folder / f'output{rank}.txt' for rank in (0, 1)]
    assert [process.wait(300) for process in found] == [0, 0], outputs[0].read_text()[-3000:]
    one, two = (json.loads((project.folder / name / 'test_results.json').read_text()) for name in ('one', 'two'))
    assert one == two and one['quantized'] and one['full_precision']
    assert 'W8A8' in outputs[0].read_text() and 'saved to' not in outputs[1].read_text()


def test_a_rank_that_dies_ends_the_other_with_one_sentence(project):
    config = project.config('w8a8', 'dies.py', **HALF)
    spied(config)
    found = ranks_of_tool(
        'dfq_train', [config, '--work-dir', project.folder / 'dies'], project.folder, SPY_KILL='step 1', SPY_RANK='1'
    )
    statuses = [process.wait(300) for process in found]
    output = (project.folder / 'output0.txt').read_text()
    assert statuses == [1, -9], output[-3000:]
    assert 'psaq-dfq-train: another rank failed or did not answer in time' in output.splitlines()[-1]
    assert 'Traceback' not in output
