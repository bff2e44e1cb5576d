"""The learning rate at each optimizer step."""

import math
from collections.abc import Sequence


def learning_rate(
    step: int,
    base_lr: float,
    max_iterations: int,
    warmup_period: int = 0,
    exponent: float = 0.9,
    schedule: str = "poly",
    milestones: Sequence[int] = (),
    gamma: float = 0.1,
) -> float:
    """Rate used by optimizer step `step` (0 is the first): linear warm-up, then the schedule.

    SAMed sets the rate after a step from that step's number t: base * (t + 1) / W while t < W, then, with
    p = (t - W) / max_iterations, base * (1 - p) ** exponent; so step s > 0 runs at the rate of t = s - 1, and the
    first step at base / W (without warm-up at base). cosine: base * (1 + cos(pi * p)) / 2. constant: base.
    step: base * gamma ** (how many of `milestones` are <= s).
    """
    if step == 0 and warmup_period:
        return base_lr / warmup_period
    t = step - 1
    if step and t < warmup_period:
        return base_lr * (t + 1) / warmup_period
    left = max(0.0, 1.0 - (t - warmup_period) / max_iterations) if step else 1.0
    if schedule == "poly":
        return base_lr * left**exponent
    if schedule == "cosine":
        return base_lr * (1 - math.cos(math.pi * left)) / 2
    if schedule == "step":
        return base_lr * gamma ** sum(milestone <= step for milestone in milestones)
    return base_lr
