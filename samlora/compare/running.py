"""The runs of a comparison, several at a time, each in a process of its own, so that memory is told apart."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from samlora.compare.job import Job, run_job
from samlora.errors import InputError

_POLL = 0.1  # seconds between looks at the processes
_LINE = 160  # letters of an error that a line has room for
Done = Callable[[Job, str], None]


def run_all(jobs: Sequence[Job], slots: int, gpus: Sequence[int], done: Done) -> None:
    """Runs the jobs, `slots` at a time; 0 means in this process.

    gpus: the slots are dealt to them in turn; without any, a run takes what it finds. done: told of every job when it
    has ended, with what went wrong, or "". One that fails keeps none of the others from running. On SIGINT, SIGTERM or
    SIGHUP (a closed terminal) the runs in progress finish their step and save, and the next call goes on with them.
    """
    if slots == 0:
        with _handled(_hang_up()):
            for job in jobs:
                done(job, _tried(job))
        return
    waiting, running = list(jobs), {}
    with _handled({signal.SIGTERM: _stop, **_hang_up()}):
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


def _tried(job: Job) -> str:
    """Runs a job in this process: why it failed, or "". The traceback of what nobody foresaw goes to its output.txt."""
    try:
        run_job(job, own_process=False)
    except InputError as error:
        return str(error)
    except Exception as error:
        with open(job.folder / "output.txt", "a", encoding="utf-8") as output:
            traceback.print_exc(file=output)
        told = " ".join("".join(traceback.format_exception_only(error)).split())
        return f"{told[:_LINE]}; see {job.folder / 'output.txt'}"
    return ""


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
            [sys.executable, "-m", "samlora.compare.job", str(job.folder), str(os.getpid())],
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
    last = printed[-1].strip()[:_LINE] if printed else "it printed nothing"
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


def _stop(number: int, _frame: object) -> None:
    """Makes a signal an exception, so that the runs are not left behind."""
    raise SystemExit(128 + number)


def _hang_up() -> dict[int, Callable]:
    """What makes SIGHUP do what SIGTERM does; nothing where the system has no such signal or nohup ignores it."""
    if not hasattr(signal, "SIGHUP") or signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        return {}

    def terminate(number: int, _frame: object) -> None:
        # A closing terminal sends it twice, by itself and by the shell, and a second SIGTERM would end runs unsaved.
        signal.signal(number, signal.SIG_IGN)
        signal.raise_signal(signal.SIGTERM)

    return {signal.SIGHUP: terminate}


@contextlib.contextmanager
def _handled(handlers: Mapping[int, Callable]) -> Iterator[None]:
    """Handles signals for a while; not outside the main thread, where Python allows no handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
