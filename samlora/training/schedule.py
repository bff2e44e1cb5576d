"""The learning rate at each optimizer step."""

import math
from collections.abc import Mapping, Sequence


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
    step: base * gamma ** (how many of `milestones` are <= s). plateau: base, which `Plateau` scales.
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


class Plateau:
    """Lowers the learning rate when the mean loss of an epoch stops improving, as ReduceLROnPlateau of PyTorch does.

    patience: epochs in a row without a better loss that are accepted; the next one multiplies the rate by `gamma`.
    A loss is better when it is below the best so far by more than a share of `THRESHOLD`. scale: what the rate is
    multiplied by now.
    """

    THRESHOLD = 1e-4  # of PyTorch
    _SAVED = ("scale", "best", "stale", "total", "count")

    def __init__(self, patience: int, gamma: float):
        self.patience, self.gamma = patience, gamma
        self.scale = 1.0
        self.best, self.stale = math.inf, 0
        self.total, self.count = 0.0, 0  # of the losses of the epoch in progress

    def update(self, loss: float, ends_epoch: bool) -> None:
        """Takes note of the loss of a step."""
        self.total += loss
        self.count += 1
        if not ends_epoch:
            return
        mean = self.total / self.count
        self.total, self.count = 0.0, 0
        if mean < self.best * (1 - self.THRESHOLD):
            self.best, self.stale = mean, 0
            return
        self.stale += 1
        if self.stale > self.patience:
            self.scale, self.stale = self.scale * self.gamma, 0

    def state(self) -> dict[str, float]:
        """Plain values from which `restore` continues."""
        return {name: getattr(self, name) for name in self._SAVED}

    def restore(self, saved: Mapping[str, float]) -> None:
        """Takes over what `state` gave."""
        for name, value in saved.items():
            setattr(self, name, value)
