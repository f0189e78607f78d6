# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The distance of the student's outputs from the teacher's."""

import pytest
import torch

from psaq_mm.calibration import normalized_l1
from psaq_mm.errors import DataError


def maps(seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(2, 3, s, s, generator=generator) for s in (8, 4)]


def test_discrepancy_of_hand_made_maps():
    teacher = torch.tensor([[0.0, 2.0], [10.0, 30.0]])  # mean absolute deviations 1 and 10
    student = torch.tensor([[1.0, 2.0], [10.0, 25.0]])  # mean absolute differences 0.5 and 2.5
    assert [float(normalized_l1(student[i : i + 1], teacher[i : i + 1])) for i in range(2)] == [0.5, 0.25]
    assert float(normalized_l1([student], [teacher])) == 0.375


def test_scales_weigh_alike_whatever_their_size():
    teacher, student = maps(0), maps(1)
    scaled = [m * s for m, s in zip(teacher, (1000.0, 0.001))], [m * s for m, s in zip(student, (1000.0, 0.001))]
    torch.testing.assert_close(normalized_l1(scaled[1], scaled[0]), normalized_l1(student, teacher))
    assert float(normalized_l1(teacher, teacher)) == 0


def test_samples_do_not_couple():
    teacher, student = maps(0), maps(1)
    alone = [float(normalized_l1([s[i : i + 1] for s in student], [t[i : i + 1] for t in teacher])) for i in range(2)]
    assert float(normalized_l1(student, teacher)) == pytest.approx(sum(alone) / 2)


def test_divisor_takes_no_gradient_but_the_difference_does():
    teacher, student = torch.randn(1, 6, requires_grad=True), torch.randn(1, 6, requires_grad=True)
    normalized_l1(student, teacher).backward()
    torch.testing.assert_close(teacher.grad, -student.grad)


def test_constant_teacher_and_half_precision_are_finite():
    assert normalized_l1(torch.zeros(1, 4), torch.ones(1, 4)).isfinite()
    assert normalized_l1(maps(1)[0].half(), maps(0)[0].half()).dtype == torch.float32


@pytest.mark.parametrize(
    'student, teacher, match',
    [
        ([], [], '0 and 0 feature maps'),
        (maps(), maps()[:1], '2 and 1 feature maps'),
        (maps(), maps()[::-1], r'feature map 0 is \(2, 3, 8, 8\)'),
    ],
)
def test_maps_that_do_not_fit_are_named(student, teacher, match):
    with pytest.raises(DataError, match=match):
        normalized_l1(student, teacher)
