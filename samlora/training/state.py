"""All that changes while a run trains, saved and restored together."""

import math
from pathlib import Path

import torch
from torch import nn

from samlora.errors import InputError
from samlora.model.checkpoint import adapter_tensors, load_trained
from samlora.training.average import Average
from samlora.training.reading import BadSamples
from samlora.training.schedule import Plateau

Origin = str | int | torch.Tensor
FORMAT = 3


class State:
    """Where a run is: its next step, weights and their average, optimizer, loss scale, records.

    best: highest validation Dice so far, or NaN. stale: validations since then. seconds: trained so far. Order,
    augmentation and dropout need nothing: they depend on the seed, the step and the process alone.
    """

    def __init__(
        self,
        fabric,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        average: Average,
        bad: BadSamples,
        plateau: Plateau,
    ):
        self.fabric, self.model, self.optimizer, self.average, self.bad = fabric, model, optimizer, average, bad
        self.plateau = plateau
        self.step, self.best, self.stale, self.seconds = 0, math.nan, 0, 0.0

    def validated(self, dice: float) -> bool:
        """Takes note of a validation; whether it is the best so far."""
        better = math.isnan(self.best) or dice > self.best
        self.best, self.stale = (dice, 0) if better else (self.best, self.stale + 1)
        return better

    def saved(self, origin: dict[str, Origin]) -> dict:
        """The state as tensors and plain values. origin: what the run is made from (`setup.origin`)."""
        return {
            "format": FORMAT,
            "origin": origin,
            "processes": self.fabric.world_size,
            "step": self.step,
            "best": self.best,
            "stale": self.stale,
            "seconds": self.seconds,
            "plateau": self.plateau.state(),
            "bad_samples": dict(self.bad.counts),
            "model": adapter_tensors(self.model),
            "average": self.average.tensors,
            "optimizer": self.optimizer.state_dict(),
            "loss_scale": self.fabric.strategy.precision.state_dict(),
        }

    def restore(self, saved: dict, path: Path) -> None:
        """Goes back to a saved state. Raises InputError when it does not fit the model or this version."""
        if saved.get("format") != FORMAT:
            raise InputError(f"{path}: was saved by another version of samlora; continue with that, or begin anew")
        load_trained(self.model, saved["model"], path)
        self.average.load(saved["average"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.fabric.strategy.precision.load_state_dict(saved["loss_scale"])
        self.bad.counts = dict(saved["bad_samples"])
        self.plateau.restore(saved.get("plateau", {}))  # states of versions without this schedule have none
        self.step, self.best, self.stale = saved["step"], saved["best"], saved["stale"]
        self.seconds = saved["seconds"]
