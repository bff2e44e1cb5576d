"""Slices as they come: the processes that read them end with the run; those of a case may differ in size."""

import contextlib
import csv
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from samlora.data.dataset import find_slices
from samlora.data.volume import write_slice
from samlora.errors import InputError
from samlora.options import make
from samlora.pixels import SAMED
from samlora.prompting import Prompting
from samlora.training.config import TrainConfig
from samlora.training.loop import train
from samlora.training.reading import BadSamples
from samlora.training.setup import Data, make_fabric
from samlora.training.validation import stacked, validate

SCRIPT = """
import contextlib
import multiprocessing
import os
import signal
import sys
import time
from types import SimpleNamespace

from samlora.data.dataset import Batches, SliceDataset, find_slices
from samlora.training.reading import BadSamples, read_batches, worker_died


def main(folder, way):
    slices = find_slices(folder)
    spec = SimpleNamespace(num_classes=1, recipe=None)
    batches = Batches(len(slices), 2, 1000, 0)
    with contextlib.closing(read_batches(SliceDataset(slices, 0), batches, 2, BadSamples(False, print), spec)) as loader:
        for number, _ in enumerate(loader):
            workers = multiprocessing.active_children()
            if number == 1:  # both have begun
                print(*(worker.pid for worker in workers), flush=True)
                for worker in workers:  # a group is asked to end: whoever reads goes on until the first process says
                    os.kill(worker.pid, signal.SIGTERM)
                    os.kill(worker.pid, signal.SIGINT)
            if number == 20 and way == "a worker is killed":
                os.kill(workers[0].pid, signal.SIGKILL)
            if number == 20 and way == "the loop raises":
                raise KeyError("something else")
            if number == 20 and way == "the parent is killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if number > 20:
                time.sleep(0.01)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except RuntimeError as error:
        kept = error  # as whoever reports it may: its traceback holds on to the loader
        sys.exit(str(worker_died(error, 2) or error))
"""


@pytest.mark.parametrize(
    "way, code, said",
    [
        ("a worker is killed", 1, "--num_workers 2: a process that reads slices died"),
        ("the loop raises", 1, "something else"),
        pytest.param("the parent is killed", -signal.SIGKILL, "", marks=pytest.mark.soak),
    ],
)
def test_workers_end_with_the_run(tmp_path, way, code, said):
    for number in range(8):
        write_slice(tmp_path / f"data/case{number}_slice000.npz", np.zeros((8, 8)), np.zeros((8, 8), np.uint8))
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "data"), way]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, text=True, start_new_session=True, **pipes)
    try:
        # Until the pipes close, which workers hold open too; an orphan looks for its parent every five seconds.
        pids, errors = process.communicate(timeout=300)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == code and said in errors, errors
    assert len(pids.split()) == 2
    if way == "a worker is killed":
        assert errors.count("\n") == 1, errors


SIZES = [(24, 32), (32, 32), (24, 32), (40, 32)]


def write_case(folder, case, sizes=SIZES):
    """Class 1 where it is bright; a fifth of it is not."""
    for number, (height, width) in enumerate(sizes):
        label = np.zeros((height, width), np.uint8)
        label[8:18, 4 : 14 + number] = 1
        image = label * 0.8
        image[8:10] = 0
        write_slice(folder / f"{case}_slice{number:03d}.npz", image.astype(np.float32), label)


class Bright(torch.nn.Module):
    spec = SimpleNamespace(system="samed", num_classes=1, class_names=("a",), image_size=256, recipe=None)
    pixels, fill, logit_side, chunk = SAMED, (0, 0, 0), 64, 1

    def forward(self, images):
        pooled = torch.nn.functional.avg_pool2d(images[:, :1], 4)
        return torch.cat([0.4 - pooled, pooled - 0.4], 1)


def test_the_dice_of_a_case_is_that_of_all_its_pixels_whatever_sizes_its_slices_have(tmp_path):
    write_case(tmp_path, "one")
    slices, bad = find_slices(tmp_path), BadSamples(False, print)
    fabric, _ = make_fabric(TrainConfig(device="cpu"))
    data = Data([], [], slices, 1, None, None, None, None, "")
    run = SimpleNamespace(say=print)
    dice = validate(Bright(), data, fabric, torch.float32, run, bad, Prompting())["val_dice"]
    # Eight of ten rows are found: 2 * 8 / (8 + 10), but for what resizing does at borders.
    assert dice == pytest.approx(16 / 18, abs=0.05)
    assert [images.shape for images, _ in stacked(Bright(), slices, bad)] == [(2, 24, 32), (1, 32, 32), (1, 40, 32)]
    write_case(tmp_path, "one", [(32, 32)] * 4)
    ((images, truth),) = stacked(Bright(), slices, bad)
    assert images.shape == truth.shape == (4, 32, 32)


def test_who_sees_neighbouring_slices_needs_them_in_one_size(tmp_path):
    write_case(tmp_path, "one")
    model = Bright()
    model.chunk = 2
    with pytest.raises(
        InputError, match="slices of one have several sizes .24 x 32, 32 x 32, 40 x 32.*prepare"
    ) as caught:
        stacked(model, find_slices(tmp_path), BadSamples(False, print))
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:.*random weights")
@pytest.mark.parametrize("val_cases", [["two"], []])
def test_cases_of_several_sizes_are_trained_on(tmp_path, val_cases):
    write_case(tmp_path / "data", "one")
    write_case(tmp_path / "data", "two")
    options = {
        "root_path": str(tmp_path / "data"), "output": str(tmp_path / "runs"), "system": "samed", "vit_name": "vit_ti",
        "ckpt": "random", "img_size": 64, "num_classes": 1, "batch_size": 8, "device": "cpu", "max_epochs": 1,
        "stop_epoch": 1, "val_cases": val_cases,
    }  # fmt: skip
    run = train(make(TrainConfig, options))
    assert (run / "preview.png").stat().st_size
    with open(run / "metrics.csv") as file:
        (row,) = csv.DictReader(file)
    assert bool(row["val_dice"]) == bool(val_cases)
