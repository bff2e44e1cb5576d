"""What a training run leaves behind: its folder, written whole or appended line by line."""

import csv
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from samlora.errors import InputError
from samlora.files import whole
from samlora.journal import Journal
from samlora.options import write_yaml
from samlora.training.config import TrainConfig

COLUMNS = ("step", "epoch", "lr", "loss", "loss_ce", "loss_dice", "val_dice")
PACKAGES = ("samlora", "torch", "segment-anything", "lightning-fabric", "numpy", "scipy", "safetensors")


class Run:
    """A run folder. Only the first process of a run writes; in the others every call does nothing."""

    def __init__(self, folder: Path, config: TrainConfig, writes: bool = True):
        self.folder, self.writes = folder, writes
        self._journal = self._metrics = self._board = None
        if not writes:
            return
        self._journal = Journal(folder, f"--output {config.output}")
        write_yaml(folder / "config.yaml", config)

    def say(self, line: str) -> None:
        """Prints a line above the progress bar and keeps it in log.txt."""
        if self.writes:
            self._journal.say(line)

    def open_metrics(self, step: int) -> None:
        """Opens metrics.csv and TensorBoard for rows from `step` on; rows of a former life after it are dropped."""
        if not self.writes:
            return
        from torch.utils.tensorboard import SummaryWriter

        path = self.folder / "metrics.csv"
        rows = []
        if step and path.exists():
            with open(path, newline="", encoding="utf-8") as file:
                rows = [row for row in csv.DictReader(file) if int(row["step"]) < step]
        with whole(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        self._metrics = open(path, "a", newline="", encoding="utf-8")
        self._board = SummaryWriter(str(self.folder), purge_step=step)

    def record(self, **row: float) -> None:
        """Appends one row of COLUMNS to metrics.csv and TensorBoard."""
        if self.writes:
            csv.DictWriter(self._metrics, COLUMNS).writerow({k: f"{v:.8g}" for k, v in row.items()})
            self._metrics.flush()
            for name in row.keys() - {"step", "epoch"}:
                self._board.add_scalar(name, row[name], row["step"])

    def add_image(self, path: Path, step: int) -> None:
        """Shows a PNG in TensorBoard."""
        from matplotlib.image import imread

        if self.writes:
            self._board.add_image(path.stem, imread(path)[..., :3], step, dataformats="HWC")

    def save_state(self, state: dict) -> None:
        """Writes state.pt, from which `--resume` continues."""
        if self.writes:
            with whole(self.folder / "state.pt") as temporary:
                torch.save(state, temporary)

    def load_state(self) -> dict | None:
        """What `save_state` wrote last, or None. Raises InputError when it cannot be read."""
        path = self.folder / "state.pt"
        if not path.exists():
            return None
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise InputError(
                f"{path}: cannot be read ({str(error).splitlines()[0][:120]}); delete it to start over"
            ) from None

    def describe(self, facts: Mapping[str, Any]) -> None:
        """Writes run.json: the facts given and the versions, machine and commit."""
        if not self.writes:
            return
        everything = dict(facts) | {
            "versions": versions(),
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
            "commit": commit(),
        }
        with whole(self.folder / "run.json") as temporary:
            temporary.write_text(json.dumps(everything, indent=2) + "\n", encoding="utf-8")

    def close(self) -> None:
        for file in (self._journal, self._metrics, self._board):
            if file is not None:
                file.close()


def versions() -> dict[str, str | None]:
    """Version of every package that figures depend on, and of Python."""
    return {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of the source tree samlora runs from, with + where files were changed; None outside git."""
    here = Path(__file__).resolve().parent
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
