"""A folder that all processes have to see: whether they do is found at the start, and not when they resume."""

import contextlib
import os
import secrets
import socket
import time
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from training.runtime.settings import SettingsError

# Network file systems show a new file to others after some seconds.
PATIENCE = 20.0


def check_shared(accelerator: Accelerator, folder: Path, name: str = "output_dir") -> None:
    """Make the folder, and have the first process write a file there that all others must find. For all ranks.

    Args:
        name: of the setting, for the message.

    Raises:
        SettingsError: naming the processes that do not see it, their machines and the folder; on all ranks.
    """
    token, problem = f".shared-{secrets.token_hex(8)}", None
    if accelerator.is_main_process:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / token).write_text(token)
        except OSError as error:
            problem = f"{name}: cannot write to {folder}: {error.strerror or error}"
    if accelerator.num_processes > 1:
        token, problem, host = broadcast_object_list([token, problem, socket.gethostname()])
        if problem is None:
            seen = accelerator.is_main_process or _appears(folder / token)
            who = None if seen else f"process {accelerator.process_index} on {socket.gethostname()}"
            blind = [rank for rank in gather_object([who]) if rank is not None]
            if blind:
                problem = (
                    f"{name}: {', '.join(blind[:8])}{', ...' if len(blind) > 8 else ''} does not see what the "
                    f"first process (on {host}) writes to {folder.absolute()}: put it on a file system "
                    "that all machines share, under the same path"
                )
    if accelerator.is_main_process:
        with contextlib.suppress(OSError):
            (folder / token).unlink()
    if problem is not None:
        raise SettingsError(problem)


def _appears(path: Path) -> bool:
    """Tell whether the file appears within some seconds."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            os.listdir(path.parent)  # makes NFS ask its server again
            if path.read_text() == path.name:
                return True
        except OSError:
            pass
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
