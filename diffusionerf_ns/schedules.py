"""How tau and the weights of the loss terms change over training: pure functions of the step.

Schedules are written in fractions of the run, so that runs of 1,500 and of 10,000 steps have the same shape; only
`boost` counts steps. The paper's own corner steps are given beside each config field.
"""


def fraction(step: int, total_steps: int) -> float:
    """step / total_steps, held in [0, 1]."""
    return min(max(step / max(total_steps, 1), 0.0), 1.0)


def linear(x: float, x0: float, x1: float, y0: float, y1: float) -> float:
    """y0 for x <= x0, y1 for x >= x1, the straight line between; where x1 <= x0, y0 before x0 and y1 from it on."""
    if x1 <= x0:
        return y1 if x >= x0 else y0
    if x <= x0:
        return y0
    if x >= x1:
        return y1
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def tau(step: int, total_steps: int, *, start: float, end: float, until: float) -> float:
    """Noise level of the prior: ``start`` falling linearly to ``end`` at the fraction ``until`` of the run.

    Paper section 3.4: 0.1 falling to 0 over the first 2,500 of 10,000 steps.
    """
    return linear(fraction(step, total_steps), 0.0, until, start, end)


def ramp(step: int, total_steps: int, *, start: float, end: float) -> float:
    """0 until the fraction ``start`` of the run, then rising linearly to 1 at ``end``.

    Paper: the distortion term rises from step 3,000 to 8,000 of 10,000.
    """
    return linear(fraction(step, total_steps), start, end, 0.0, 1.0)


def boost(step: int, *, steps: int, after: float) -> float:
    """1 for the first ``steps`` steps, then ``after``. Authors' code: frustum weight x 1 for 100 steps, then x 0.01."""
    return 1.0 if step < steps else after


def fade_out(step: int, total_steps: int, *, start: float, end: float, final: float) -> float:
    """1 until the fraction ``start`` of the run, then falling linearly to ``final`` at ``end``."""
    return linear(fraction(step, total_steps), start, end, 1.0, final)
