"""The runs of a comparison, several at a time, each in a process of its own, so that memory is told apart."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from samlora.compare.job import Job, run_job
from samlora.errors import InputError

_POLL = 0.1  # seconds between looks at the processes
Done = Callable[[Job, str], None]


def run_all(jobs: Sequence[Job], slots: int, gpus: Sequence[int], done: Done) -> None:
    """Runs the jobs, `slots` at a time; 0 means in this process.

    gpus: the slots are dealt to them in turn; without any, a run takes what it finds. done: told of every job when it
    has ended, with what went wrong, or "". One that fails keeps none of the others from running. On SIGINT or SIGTERM
    the runs in progress finish their step and save, and the next call goes on with them.
    """
    if slots == 0:
        for job in jobs:
            problem = ""
            try:
                run_job(job, own_process=False)
            except InputError as error:
                problem = str(error)
            done(job, problem)
        return
    waiting, running = list(jobs), {}
    with _stopping():
        try:
            while waiting or running:
                for slot in range(slots):
                    if waiting and slot not in running:
                        job = waiting.pop(0)
                        gpu = gpus[slot % len(gpus)] if gpus else None
                        running[slot] = job, _start(job, slots, gpu)
                time.sleep(_POLL)
                for slot, (job, process) in [*running.items()]:
                    if process.poll() is not None:
                        del running[slot]
                        done(job, _problem(job, process.returncode))
        except BaseException:
            _end([process for _, process in running.values()])
            raise


def _start(job: Job, slots: int, gpu: int | None) -> subprocess.Popen:
    """The process of a job. What it prints goes to output.txt in the job's folder."""
    environment = dict(os.environ)
    # All threads of all runs together are as many as there are cores: more only get in each other's way.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // slots)))
    package = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (package, environment.get("PYTHONPATH"))))
    if gpu is not None:
        visible = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        if visible and gpu >= len(visible):
            raise InputError(f"--devices cuda:{gpu}: CUDA_VISIBLE_DEVICES shows {len(visible)}; number them from 0")
        environment["CUDA_VISIBLE_DEVICES"] = visible[gpu] if visible else str(gpu)
    with open(job.folder / "output.txt", "a", encoding="utf-8") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "samlora.compare.job", str(job.folder)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C comes to this process alone, which asks the others to finish their step
        )


def _problem(job: Job, code: int) -> str:
    """Why a process did not do its job, or ""."""
    if code == 0:
        return ""
    printed = (job.folder / "output.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    if code == 2 and printed and printed[-1].startswith("samlora: "):
        return printed[-1].removeprefix("samlora: ")
    last = printed[-1].strip()[:160] if printed else "it printed nothing"
    return f"its process ended with code {code} ({last}); see {job.folder / 'output.txt'}"


def _end(processes: Sequence[subprocess.Popen]) -> None:
    """Lets runs finish their step and save; a second Ctrl-C ends them at once."""
    for process in processes:
        process.send_signal(signal.SIGTERM)
    try:
        for process in processes:
            process.wait()
    except BaseException:
        for process in processes:
            process.kill()
        raise


@contextlib.contextmanager
def _stopping() -> Iterator[None]:
    """Makes SIGTERM an exception, so that the runs are not left behind."""

    def stop(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)
