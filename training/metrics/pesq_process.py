"""PESQ in a process of its own: its C code has room for 50 utterances, and dies of more.

As a script, this file is that process. It reads pairs of signals from its standard input and writes their
scores, plain numbers both ways: nothing that could hold a program. It imports neither torch nor this project.
"""

import contextlib
import logging
import math
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

RATE = 16_000
# What PESQ may take: it needs about a thirtieth of the recording's length on an idle core.
SECONDS_AT_LEAST = 120
SECONDS_PER_SECOND = 5


class PesqProcess:
    """The process; it is started when it is first needed, and again after it died."""

    def __init__(self):
        self.process = None

    def score(self, original: np.ndarray, decoded: np.ndarray) -> float:
        """Wide-band PESQ of two signals (L,) at 16 kHz; NaN where there is none, or PESQ dies of them.

        Raises:
            RuntimeError: if the process cannot be started.
        """
        if self.process is None or self.process.poll() is not None:
            self.close()
            self.process = _start()
        process, seconds = self.process, len(original) / RATE
        signals = np.stack([original, decoded]).astype("<f4")
        try:
            with _killed_after(SECONDS_AT_LEAST + SECONDS_PER_SECOND * seconds, process):
                process.stdin.write(struct.pack("<q", len(original)) + signals.tobytes())
                process.stdin.flush()
                answer = process.stdout.read(8)
        except OSError:
            answer = b""
        if len(answer) == 8:
            return struct.unpack("<d", answer)[0]
        self.close()
        logging.warning(
            f"PESQ died ({_ending(process)}) of a recording of {seconds:.1f} s, which counts as one "
            "without PESQ: it has room for 50 utterances"
        )
        return math.nan

    def close(self) -> None:
        """End the process."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait()
            process.stdout.close()
            with contextlib.suppress(OSError):  # what was not yet written cannot be
                process.stdin.close()


def _start() -> subprocess.Popen:
    pipe = subprocess.PIPE
    # -P: the folder of this file is no place to import from.
    process = subprocess.Popen([sys.executable, "-P", __file__], stdin=pipe, stdout=pipe)
    with _killed_after(SECONDS_AT_LEAST, process):
        begun = process.stdout.read(1)
    if begun != b"\n":
        raise RuntimeError(f"PESQ cannot be started ({_ending(process)})")
    return process


@contextlib.contextmanager
def _killed_after(seconds: float, process: subprocess.Popen) -> Iterator[None]:
    alarm = threading.Timer(seconds, process.kill)
    alarm.daemon = True
    alarm.start()
    try:
        yield
    finally:
        alarm.cancel()


def _ending(process: subprocess.Popen) -> str:
    code = process.wait()
    if code >= 0:
        return f"exit status {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _serve(questions: BinaryIO, answers: BinaryIO) -> None:
    from pesq import PesqError, pesq

    answers.write(b"\n")
    answers.flush()
    while len(head := questions.read(8)) == 8:
        (length,) = struct.unpack("<q", head)
        if len(content := questions.read(8 * length)) < 8 * length:
            break
        original, decoded = np.frombuffer(content, "<f4").reshape(2, length)
        try:
            score = pesq(RATE, original, decoded, "wb", on_error=PesqError.RETURN_VALUES)
        except (ValueError, ArithmeticError):
            score = math.nan
        answers.write(struct.pack("<d", score if score > 0 else math.nan))
        answers.flush()


def _main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # its death is expected
    except (ImportError, ValueError, OSError):
        pass
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what PESQ prints is no answer
    _serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    _main()
