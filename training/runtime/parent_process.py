"""Workers that end with the process that started them, however it ends."""

import os
import threading
from multiprocessing import parent_process


def end_with_parent() -> None:
    """End this process of multiprocessing when its parent is gone, in the middle of whatever it does.

    A worker of a pool whose parent was killed would finish its work, and take the next.
    """
    threading.Thread(target=_wait_and_end, daemon=True).start()


def _wait_and_end() -> None:
    parent_process().join()
    os._exit(1)
