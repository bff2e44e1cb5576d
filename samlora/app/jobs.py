"""Work that takes long: in a thread, with progress, and stopped when it is asked to."""

import threading
import traceback
from collections.abc import Callable

from samlora.errors import InputError


class Job:
    """One piece of long work. what: as people call it. total: steps it may take; `done` counts those taken.

    work: gets the job, looks at `cancelled` between steps, and returns what to tell when it has ended.
    """

    def __init__(self, what: str, total: int, work: Callable[["Job"], str]):
        self.what = what
        self.total = total
        self.done = 0
        self.error = ""
        self.message = ""
        self._work = work
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=what, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def cancel(self) -> None:
        """Asks the work to end after the step it is at."""
        self._stop.set()

    def wait(self, seconds: float | None = None) -> None:
        """Returns when the work has ended, or after `seconds`."""
        self._thread.join(seconds)

    @property
    def cancelled(self) -> bool:
        return self._stop.is_set()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def state(self) -> dict:
        """How far it is, as values that JSON can hold."""
        told = {name: getattr(self, name) for name in ("what", "done", "total", "error", "message")}
        return told | {"running": self.running}

    def _run(self) -> None:
        try:
            self.message = self._work(self)
        except InputError as error:
            self.error = str(error)
        except Exception as error:  # a bug: the page says so, the terminal has the traceback
            traceback.print_exc()
            self.error = f"{self.what} failed ({type(error).__name__}: {error}); the terminal says more"
