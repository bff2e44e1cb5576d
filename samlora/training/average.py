"""A running average of the trained weights."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from samlora.model.checkpoint import adapter_tensors


class Average:
    """Exponential moving average of what trains in a model; with decay 0 there is none and every call does nothing.

    After step t (the first is 1): average = d * average + (1 - d) * weights, d = min(decay, (1 + t) / (10 + t)), so
    that a short run is not held back by where it began. Source: TensorFlow's ExponentialMovingAverage.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self._weights = adapter_tensors(model) if decay else {}
        self.tensors = {name: weight.clone() for name, weight in self._weights.items()}

    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, weight in self._weights.items():
            self.tensors[name].lerp_(weight, 1 - decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within this context the model has the average's weights; after it, its own again, bit for bit."""
        own = {name: weight.clone() for name, weight in self._weights.items()}
        self._fill(self.tensors)
        try:
            yield
        finally:
            self._fill(own)

    def _fill(self, values: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, weight in self._weights.items():
                weight.copy_(values[name])

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Takes over a saved average."""
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])
