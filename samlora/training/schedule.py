"""The learning rate at each optimizer step."""


def learning_rate(
    step: int, base_lr: float, max_iterations: int, warmup_period: int = 0, exponent: float = 0.9
) -> float:
    """Rate used by optimizer step `step` (0 is the first): linear warm-up, then polynomial decay.

    SAMed sets the rate after a step from that step's number t: base * (t + 1) / W while t < W, then
    base * (1 - (t - W) / max_iterations) ** exponent; so step s > 0 runs at the rate of t = s - 1, and the
    first step at base / W (without warm-up at base).
    """
    if step == 0:
        return base_lr / warmup_period if warmup_period else base_lr
    t = step - 1
    if t < warmup_period:
        return base_lr * (t + 1) / warmup_period
    return base_lr * max(0.0, 1.0 - (t - warmup_period) / max_iterations) ** exponent
