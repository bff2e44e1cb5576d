"""Processes that read slices: they end with the run, however it ends."""

import contextlib
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from samlora.data.volume import write_slice

SCRIPT = """
import contextlib
import multiprocessing
import os
import signal
import sys
import time

from samlora.data.dataset import Batches, SliceDataset, find_slices
from samlora.training.reading import BadSamples, read_batches, worker_died


def main(folder, way):
    slices = find_slices(folder)
    batches = Batches(len(slices), 2, 1000, 0)
    with contextlib.closing(read_batches(SliceDataset(slices, 0), batches, 2, BadSamples(False, print), 1)) as loader:
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
        ("the parent is killed", -signal.SIGKILL, ""),
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
        pids, errors = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == code and said in errors, errors
    assert len(pids.split()) == 2
    if way == "a worker is killed":
        assert errors.count("\n") == 1, errors
