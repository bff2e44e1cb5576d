"""Being asked to stop: the step in progress is finished and saved first."""

import os
import signal
import threading
from types import FrameType

import torch

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Remembers, as a context, the first SIGINT or SIGTERM; the second one ends the process at once.

    Outside the main thread, where Python allows no handlers, nothing is remembered.
    """

    def __init__(self):
        self.signal = 0
        self._former: dict[int, object] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        if self.signal:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        self.signal = number
        # Written past Python's buffers, which the interrupted code may be in the middle of using.
        os.write(2, b"\nsamlora: finishing this step and saving; once more stops at once\n")

    def agreed(self, fabric) -> int:
        """The signal, or 0; the same in every process of the run, since they must all stop at one step."""
        if fabric.world_size == 1:
            return self.signal
        return int(fabric.all_reduce(torch.tensor(float(self.signal), device=fabric.device), reduce_op="max"))
