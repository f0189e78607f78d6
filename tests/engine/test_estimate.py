"""How long a run still takes, by a clock that the tests move."""

import pytest

from psaq_mm.engine.runner.estimate import Part, RunEstimate, in_words, rounding_work
from psaq_mm.progress import listening, stage


class Run:
    """A run whose parts take as long as a test says."""

    def __init__(self, *parts, bound=lambda: None):
        self.now, self.lines = 0.0, []
        self.estimate = RunEstimate(parts, self.lines.append, bound, lambda: self.now)

    def steps(self, name, total, seconds, count=None, done=0):
        """``count`` steps of a stage of ``total``, each of ``seconds``."""
        with stage(name, total, done) as own:
            for _ in range(total - done if count is None else count):
                self.now += seconds
                own.advance()


@pytest.mark.parametrize(
    ('seconds', 'words'),
    [(0.4, '0 seconds'), (1, '1 second'), (33, '30 seconds'), (360, '6 minutes'), (9000, '2.5 hours')],
)
def test_words(seconds, words):
    assert in_words(seconds) == words


def test_the_first_line_comes_after_the_first_steps_of_the_first_part():
    run = Run(Part('Drawing pictures', 96, 9.0), Part('Observing ranges', 96, 0.5))
    with listening(run.estimate):
        run.steps('Drawing pictures', 96, 1.0, count=1)
        assert not run.lines
        run.steps('Drawing pictures', 96, 1.0, count=1)
    assert run.lines == ['About 2 minutes left (drawing pictures 94 pictures of 1.0 s, observing ranges 96 pictures)']
    assert run.estimate.left == pytest.approx(94 * 1.0 + 96 * 0.5)


def test_the_student_has_a_line_of_its_own_and_others_come_once_a_minute():
    run = Run(Part('Observing ranges', 3, 1.0), Part('Student', 400, 9.0, 'steps'))
    with listening(run.estimate):
        run.steps('Observing ranges', 3, 0.1)
        run.steps('Student', 400, 0.9)
    student = [line for line in run.lines if 'student 398 steps of 900 ms' in line]
    assert student == ['About 6 minutes left (student 398 steps of 900 ms)']
    assert 5 <= len(run.lines) - 2 <= 6


def test_rounds_within_the_student_are_counted_apart_and_drawn_pictures_are_not():
    run = Run(Part('Synthesis', 20, 1.0, 'steps'), Part('Student', 10, 1.0, 'steps'))
    with listening(run.estimate), stage('Student', 10) as student:
        run.steps('Synthesis', 5, 2.0)
        run.steps('Drawing pictures', 4, 0.25)
        run.now += 1.0
        student.advance()
    synthesis, student = run.estimate.parts['Synthesis'], run.estimate.parts['Student']
    assert (synthesis.seconds, synthesis.done) == (10.0, 5)
    assert (student.seconds, student.done) == (2.0, 1)
    assert run.estimate.left == pytest.approx(15 * 2.0 + 9 * 2.0)


def test_a_resumed_student_is_measured_on_its_own_steps():
    run = Run(Part('Student', 400, 1.0, 'steps'))
    with listening(run.estimate):
        run.steps('Student', 400, 0.5, count=2, done=300)
        assert run.lines == ['About 50 seconds left (student 98 steps of 500 ms)']
    assert run.estimate.left == pytest.approx(98 * 0.5)


def test_a_bound_ends_the_run():
    run = Run(Part('Student', 400, 1.0, 'steps'), bound=lambda: 60 - run.now)
    with listening(run.estimate):
        run.steps('Student', 400, 10.0, count=2)
    assert run.estimate.left == 40


def test_layers_count_by_their_work():
    layers = [(192, 192), (768, 192), (192, 768)]
    work = rounding_work(layers)
    assert work[2] > 5 * work[0] > 0
    run = Run(Part('Rounding weights', 3, 1.0, 'layers', work))
    with listening(run.estimate), stage('Rounding weights', 3) as rounding:
        for one in work[:2]:
            run.now += 100 * one
            rounding.advance()
        assert run.estimate.left == pytest.approx(100 * work[2])


def test_a_first_step_that_takes_longer_than_it_was_guessed_does_not_end_the_estimate_at_zero():
    run = Run(Part('Observing ranges', 2, 1.0))
    with listening(run.estimate), stage('Observing ranges', 2):
        run.now += 600
        with stage('inner'):
            assert run.estimate.left >= 600


def test_parts_take_the_time_that_is_measured_in_the_first_minute():
    """Guesses that are wrong by two: after the first minute the rest is right within a factor of two."""
    run = Run(
        Part('Drawing pictures', 96, 0.05),
        Part('Observing ranges', 96, 0.7),
        Part('Importance of rows', 96, 1.0),
    )
    with listening(run.estimate):
        run.steps('Drawing pictures', 96, 0.1)
        run.steps('Observing ranges', 96, 1.4, count=36)
        actual = 60 * 1.4 + 96 * 1.8
        assert actual / 2 < run.estimate.left < actual * 2
