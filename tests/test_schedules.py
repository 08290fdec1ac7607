"""Schedules at the corner steps that the paper gives, at steps beside them, and at degenerate settings."""

import pytest

from diffusionerf_ns import schedules


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.1), (1250, 0.05), (2499, 0.1 / 2500), (2500, 0.0), (9999, 0.0), (20_000, 0.0)]
)
def test_tau_falls_from_a_tenth_to_zero_over_the_first_2500_of_10000_steps(step, expected):
    assert schedules.tau(step, 10_000, start=0.1, end=0.0, until=0.25) == pytest.approx(expected, abs=1e-12)


def test_tau_without_a_ramp_is_constant_or_at_its_end_from_the_first_step():
    assert {schedules.tau(s, 100, start=0.1, end=0.1, until=0.5) for s in range(101)} == {0.1}
    assert [schedules.tau(s, 100, start=0.1, end=0.0, until=0.0) for s in (0, 1, 99)] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.0), (3000, 0.0), (3001, 1 / 5000), (5500, 0.5), (8000, 1.0), (9999, 1.0)]
)
def test_the_distortion_ramp_rises_from_step_3000_to_8000_of_10000(step, expected):
    assert schedules.ramp(step, 10_000, start=0.3, end=0.8) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("start", "steps"), [(0.0, (1.0, 1.0, 1.0)), (0.5, (0.0, 1.0, 1.0)), (1.0, (0.0, 0.0, 1.0))])
def test_a_ramp_of_no_length_is_a_switch(start, steps):
    assert tuple(schedules.ramp(s, 100, start=start, end=start) for s in (0, 50, 100)) == steps


@pytest.mark.parametrize(("step", "expected"), [(0, 1.0), (99, 1.0), (100, 0.01), (5000, 0.01)])
def test_the_frustum_weight_is_full_for_exactly_100_steps(step, expected):
    assert schedules.boost(step, steps=100, after=0.01) == expected


def test_a_boost_of_no_steps_never_acts():
    assert schedules.boost(0, steps=0, after=0.01) == 0.01


@pytest.mark.parametrize(("step", "expected"), [(0, 1.0), (600, 1.0), (800, 0.6), (1000, 0.2)])
def test_fade_out_falls_linearly_to_its_final_value(step, expected):
    assert schedules.fade_out(step, 1000, start=0.6, end=1.0, final=0.2) == pytest.approx(expected)


def test_a_fade_that_starts_at_the_end_of_the_run_leaves_every_step_alone():
    assert {schedules.fade_out(s, 1000, start=1.0, end=1.0, final=0.0) for s in range(1000)} == {1.0}


@pytest.mark.parametrize(("step", "total", "expected"), [(0, 10, 0.0), (5, 10, 0.5), (15, 10, 1.0), (3, 0, 1.0)])
def test_the_fraction_of_a_run_is_held_between_zero_and_one(step, total, expected):
    assert schedules.fraction(step, total) == expected


@pytest.mark.parametrize(("x", "expected"), [(-1.0, 3.0), (0.0, 3.0), (1.0, 4.0), (2.0, 5.0), (9.0, 5.0)])
def test_linear_is_flat_outside_its_corners(x, expected):
    assert schedules.linear(x, 0.0, 2.0, 3.0, 5.0) == expected


@pytest.mark.parametrize("total", [100, 1500, 10_000])
def test_schedules_have_the_same_shape_in_runs_of_every_length(total):
    quarter, half = total // 4, total // 2
    assert schedules.tau(quarter, total, start=0.1, end=0.0, until=0.25) == pytest.approx(0.0, abs=1e-12)
    assert schedules.ramp(half, total, start=0.3, end=0.8) == pytest.approx(0.4)
