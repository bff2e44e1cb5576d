"""What a training run leaves behind: its folder, written whole or appended line by line."""

import contextlib
import csv
import errno
import json
import os
import platform
import shlex
import subprocess
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from samlora.errors import InputError
from samlora.files import whole
from samlora.journal import Journal
from samlora.model.checkpoint import save_adapter
from samlora.options import write_yaml
from samlora.training.config import TrainConfig

# Columns of metrics.csv before and after the parts of the loss.
BEFORE, AFTER = ("step", "epoch", "lr", "loss"), ("val_dice", "val_dice_prompted", "grad_norm")
SECONDS_TO_END = 15  # what reads slices for a process outlives its being killed by some seconds
LAST, NEXT, PREVIOUS = "state.pt", "state_next.pt", "state_previous.pt"
PACKAGES = ("samlora", "torch", "segment-anything", "lightning-fabric", "numpy", "scipy", "safetensors")


class Run:
    """A run folder. Only the first process of a run writes; in the others every call does nothing.

    Whatever cannot be written raises InputError; what was saved before stays as it was. Raises InputError, too, where
    the folder holds a run that is not to be resumed. processes: of the run, on all machines.
    """

    def __init__(self, folder: Path, config: TrainConfig, writes: bool = True, processes: int = 1):
        self.folder, self.writes, self.processes = folder, writes, processes
        self._journal = self._lock = self._metrics = self._board = None
        if not writes:
            return
        self._journal = Journal(folder, f"--output {config.output}")
        self._lock = lock(folder)
        for pattern in (".part-*", ".tmp*"):  # ours and safetensors', of a process that was killed while it wrote
            for path in folder.glob(pattern):
                path.unlink(missing_ok=True)
        if not (folder / "config.yaml").exists():
            self.keep_options(config)
        elif not config.resume:  # begun by another process while this one waited for the lock
            self.close()
            raise InputError(taken(folder))

    def keep_options(self, config: TrainConfig) -> None:
        """Writes config.yaml, from which `--resume` takes the options of the run."""
        if self.writes:
            write_yaml(self.folder / "config.yaml", replace(config, resume=False))

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Turns what the operating system raises meanwhile into an InputError; also where the folder is gone."""
        try:
            if not (self.folder / "config.yaml").exists():
                raise FileNotFoundError(errno.ENOENT, "it is gone")
            yield
        except InputError as error:
            raise InputError(f"{error}; then: {self.resume_command}") from None
        except OSError as error:
            raise InputError(
                f"{self.folder}: cannot be written ({error.strerror}); put that right, then: {self.resume_command}"
            ) from None

    @property
    def resume_command(self) -> str:
        started = ""
        if self.processes > 1 and "LOCAL_WORLD_SIZE" in os.environ and "TORCHELASTIC_RUN_ID" in os.environ:
            here = int(os.environ["LOCAL_WORLD_SIZE"])
            nodes = f"--nnodes {self.processes // here} " if self.processes > here else ""
            started = f"torchrun {nodes}--nproc_per_node {here} -m "
        return f"{started}samlora train --resume {shlex.quote(str(self.folder))}"

    def say(self, line: str) -> None:
        """Prints a line above the progress bar and keeps it in log.txt."""
        if self.writes:
            with self.writing():
                self._journal.say(line)

    def open_metrics(self, step: int, parts: Sequence[str]) -> None:
        """Opens metrics.csv and TensorBoard for rows from `step` on; rows of a former life after it are dropped.

        parts: names of the parts of the loss.
        """
        if not self.writes:
            return
        self._columns = (*BEFORE, *parts, *AFTER)
        from torch.utils.tensorboard import SummaryWriter

        path = self.folder / "metrics.csv"
        rows = []
        if step and path.exists():
            text = path.read_bytes().decode("utf-8", "replace")
            whole_lines = text[: text.rfind("\n") + 1]  # a killed process may leave a part of a row
            rows = list(csv.DictReader(whole_lines.splitlines()))
            sound = [row for row in rows if (row.get("step") or "").isdecimal()]
            if len(sound) < len(rows):
                self.say(f"warning: {path}: {len(rows) - len(sound)} rows are damaged and left out")
            rows = [row for row in sound if int(row["step"]) < step]
        with self.writing():
            with whole(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, self._columns, restval="", extrasaction="ignore")
                writer.writeheader()
                writer.writerows(rows)
            self._metrics = open(path, "a", newline="", encoding="utf-8")
            self._board = SummaryWriter(str(self.folder), purge_step=step)

    def record(self, **row: float) -> None:
        """Appends one row to metrics.csv and TensorBoard."""
        if self.writes:
            with self.writing():
                csv.DictWriter(self._metrics, self._columns).writerow({k: f"{v:.8g}" for k, v in row.items()})
                self._metrics.flush()
                for name in row.keys() - {"step", "epoch"}:
                    self._board.add_scalar(name, row[name], row["step"])

    def add_image(self, path: Path, step: int) -> None:
        """Shows a PNG in TensorBoard."""
        from matplotlib.image import imread

        if self.writes:
            with self.writing():
                self._board.add_image(path.stem, imread(path)[..., :3], step, dataformats="HWC")

    def save_adapter(self, model: nn.Module, name: str) -> None:
        """Writes the model's adapter as `name`.safetensors."""
        if self.writes:
            with self.writing():
                save_adapter(model, self.folder / f"{name}.safetensors")

    def save_state(self, state: dict) -> None:
        """Writes state.pt, from which `--resume` continues; the one before it stays as state_previous.pt.

        At every moment one of them is whole, or state_next.pt is.
        """
        if not self.writes:
            return
        last, previous, coming = (self.folder / name for name in (LAST, PREVIOUS, NEXT))
        with self.writing():
            os.fsync(self._metrics.fileno())  # the rows before a saved step must outlive a power cut with it
            with whole(coming) as temporary:
                torch.save(state, temporary)
            if last.exists():
                last.replace(previous)
            coming.replace(last)

    def load_state(self) -> tuple[dict, Path] | None:
        """What `save_state` wrote last and the file it was in, or None; falls back, and says so, where it is damaged.

        Raises InputError when no file can be read, or all are gone though the run had ended.
        """
        problems = []
        for path in (self.folder / name for name in (LAST, NEXT, PREVIOUS)):
            try:
                state = read_state(path)
            except InputError as error:
                problems.append(str(error))
                continue
            if state is not None:
                if path.name != LAST:
                    why = problems[0] if problems else f"{self.folder / LAST}: is missing"
                    earlier = ", one state earlier" if path.name == PREVIOUS else ""
                    self.say(f"warning: {why}; continuing from {path.name}{earlier}")
                    if self.writes:  # or the next save would put it in the place of a sound one
                        with self.writing():
                            (self.folder / LAST).unlink(missing_ok=True)
                return state, path
        if problems:
            raise InputError(f"{problems[0]}; delete the state files of {self.folder} to start over")
        if ended := facts_of(self.folder).get("steps"):
            raise InputError(
                f"{self.folder}: ended at step {ended}, but its {LAST} is gone; put it back, or begin a new run from "
                f"its weights: --lora_ckpt {self.folder / 'adapter_last.safetensors'} --output OTHER"
            )
        return None

    def describe(self, facts: Mapping[str, Any]) -> None:
        """Writes run.json: the facts given and the versions, machine and commit."""
        if not self.writes:
            return
        everything = dict(facts) | {
            "versions": versions(),
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
            "commit": commit(),
        }
        with self.writing(), whole(self.folder / "run.json") as temporary:
            temporary.write_text(json.dumps(everything, indent=2) + "\n", encoding="utf-8")

    def close(self) -> None:
        """Closes all files. What could not be written has been reported by then."""
        for file in (self._metrics, self._board, self._journal, self._lock):
            if file is not None:
                with contextlib.suppress(OSError):
                    file.close()


def taken(folder: Path) -> str:
    """What to say where a new run would be begun in the folder of another."""
    return f"{folder} holds a run already; continue it with --resume, or choose another --output"


def has_state(folder: Path) -> bool:
    """Whether a run saved a state there."""
    return any((folder / name).exists() for name in (LAST, NEXT, PREVIOUS))


def facts_of(folder: Path) -> dict:
    """What run.json says; nothing where there is none. Raises InputError where it cannot be read."""
    path = folder / "run.json"
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise InputError(f"{path}: is damaged; delete it, training writes it anew") from None


def lock(folder: Path) -> IO | None:
    """A file that, while it is open, keeps other processes from writing into a run folder.

    None where there are no such locks (Windows, some network disks). Raises InputError when another process has it.
    """
    try:
        import fcntl
    except ImportError:
        return None
    file = open(folder / "log.txt", "rb")
    end = time.monotonic() + SECONDS_TO_END
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > end:
                file.close()
                raise InputError(f"{folder}: another process is training in it; wait for it or stop it") from None
            time.sleep(0.1)
        except OSError:
            file.close()
            return None


def read_state(path: Path) -> dict | None:
    """A state file, every check sum compared; None where there is none. Raises InputError for a damaged one."""
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"{damaged} is damaged")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile and torch each have their own kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise InputError(f"{path}: cannot be read ({reason})") from None


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
