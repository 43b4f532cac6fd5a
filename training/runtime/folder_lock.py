"""A lock on a folder that one command at a time may write to, held for as long as the command runs."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from training.runtime.settings import SettingsError

LOCK = ".lock"
# What flock answers on a file system that has no locks.
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
_held: set[int] = set()  # descriptors


@contextlib.contextmanager
def hold_folder(
    folder: Path, name: str = "output_dir", accelerator: Accelerator | None = None
) -> Iterator[None]:
    """Keep other commands from writing to a folder until the block ends.

    The lock is the kernel's, on an open file: however the process ends, it goes with it, and nothing stale
    blocks the next run. The file only names the holder. Reading the folder needs no lock.

    Args:
        folder: made if it is not there.
        name: of the setting, for the message.
        accelerator: of a command of several processes, which all call this; the first one holds the lock.

    Raises:
        SettingsError: naming the process that holds the lock; on all processes.
    """
    lock = problem = None
    several = accelerator is not None and accelerator.num_processes > 1
    if accelerator is None or accelerator.is_main_process:
        try:
            lock = _acquire(folder, name)
        except SettingsError as error:
            problem = str(error)
    try:
        if several:
            (problem,) = broadcast_object_list([problem])
        if problem is not None:
            raise SettingsError(problem)
        yield
    finally:
        if lock is not None:
            _release(lock, folder / LOCK)


def clear_folder(folder: Path, name: str = "output_dir") -> None:
    """Delete a folder, unless a command is writing to it.

    Raises:
        SettingsError: if one is.
    """
    if folder.exists():
        with hold_folder(folder, name):
            shutil.rmtree(folder, ignore_errors=True)


def _acquire(folder: Path, name: str) -> int:
    """Lock a folder; returns the descriptor of the lock's file."""
    path = folder / LOCK
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise SettingsError(f"{name}: cannot write {path}: {error.strerror}") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                logging.warning(
                    f"{name}: the file system of {folder} has no locks: see to it yourself that no other "
                    "command writes there"
                )
            else:
                holder = _holder(lock)
                os.close(lock)
                if isinstance(error, BlockingIOError):
                    raise SettingsError(
                        f"{name}: {holder} is writing to {folder}: wait until it ends, stop it, or choose "
                        f"another {name}"
                    ) from None
                raise SettingsError(f"{name}: cannot lock {path}: {error.strerror}") from None
        if _is_at(lock, path):
            break
        os.close(lock)  # its holder deleted it after we had opened it
    _held.add(lock)
    with contextlib.suppress(OSError):  # on a full disk the holder has no name, which is no harm
        record = {"host": socket.gethostname(), "pid": os.getpid(), "since": int(time.time())}
        os.ftruncate(lock, 0)
        os.pwrite(lock, json.dumps(record).encode(), 0)
        os.fsync(lock)
    return lock


def _release(lock: int, path: Path) -> None:
    if lock not in _held:  # a forked child runs its parent's exits, but holds nothing
        return
    with contextlib.suppress(OSError):
        if _is_at(lock, path):
            path.unlink()
    _held.discard(lock)
    os.close(lock)


def _is_at(lock: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock), path.lstat())
    except FileNotFoundError:
        return False


def _holder(lock: int) -> str:
    """Words for the process that has locked the file."""
    try:
        record = json.loads(os.pread(lock, 4096, 0))
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record["since"]))
        return f"process {int(record['pid'])} on {record['host']}, started {since},"
    except (OSError, ValueError, TypeError, KeyError, OverflowError):
        return "another process"


def _drop_in_child() -> None:
    """Close the locks that a fork has copied: workers that outlive a killed command must not keep them."""
    for lock in _held:
        os.close(lock)
    _held.clear()


os.register_at_fork(after_in_child=_drop_in_child)
