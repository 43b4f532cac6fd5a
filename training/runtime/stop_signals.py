"""Signals that ask a run to stop: it finishes the step, saves, and exits with "run me again"."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger

logger = get_logger(__name__)

# EX_TEMPFAIL of sysexits.h: not an error of the job, to be tried again.
STATUS_REQUEUE = os.EX_TEMPFAIL
STATUS_INTERRUPTED = 130

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Stopped(Exception):
    """The run stopped early because a signal asked for it; its state is saved.

    Attributes:
        status: of the process: 75 (EX_TEMPFAIL) after SIGTERM and SIGUSR1, 130 after SIGINT.
    """

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.status = STATUS_INTERRUPTED if number == signal.SIGINT else STATUS_REQUEUE


class StopRequest:
    """While it is entered, the first signal is only noted; a second one does what signals usually do."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self._received = 0
        self._former: dict = {}

    def __enter__(self) -> "StopRequest":
        for number in _SIGNALS:
            try:
                self._former[number] = signal.signal(number, self._note)
            except ValueError:  # not the main thread: then signals are not ours to handle
                break
        return self

    def __exit__(self, *error) -> None:
        for number, former in self._former.items():
            signal.signal(number, former)
        self._former = {}

    def _note(self, number: int, frame) -> None:
        if self._received and number == signal.SIGINT:
            raise KeyboardInterrupt
        # Schedulers may send several, one to each process and one to the group.
        self._received = self._received or number
        text = f"\n{signal.Signals(number).name}: finishing the step, saving, then stopping\n"
        os.write(2, text.encode())  # the logging module may be in the middle of a line

    def received(self) -> int:
        """Number of the signal that any rank has received, the same on all of them; 0 if there is none."""
        if self.accelerator.num_processes == 1:
            return self._received
        number = torch.tensor(self._received, device=self.accelerator.device)
        return int(self.accelerator.gather(number).max())


def ignore_signals() -> None:
    """Ignore signals at the very end of a process, where one would only print a traceback."""
    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def deaf_to_signals() -> Iterator[None]:
    """Ignore signals during what takes a moment."""
    former = {}
    if threading.current_thread() is threading.main_thread():
        former = {number: signal.signal(number, signal.SIG_IGN) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def shield_worker(worker: int) -> None:
    """Shield a data loader's worker: signals are for the training process alone, which still needs its data.

    Schedulers and terminals send them to every process of a group. A worker ends when its parent says so.
    """
    for number in (signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
