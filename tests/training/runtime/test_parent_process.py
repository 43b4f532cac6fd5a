"""Workers of a pool end with the process that started them."""

import subprocess
import sys
import time
from pathlib import Path

import psutil

PROGRAM = """
import os, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from training.runtime.parent_process import end_with_parent

def work(number):
    print(os.getpid(), flush=True)
    time.sleep(60)

if __name__ == "__main__":
    with ProcessPoolExecutor(1, get_context("spawn"), end_with_parent) as pool:
        list(pool.map(work, range(3)))
"""


def test_a_worker_ends_when_its_parent_is_killed(tmp_path):
    script = tmp_path / "pool.py"
    script.write_text(PROGRAM)
    parent = subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": str(Path(__file__).parents[3])},
    )
    worker = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.communicate()
    for _ in range(100):
        if not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.05)
    worker.kill()
    raise AssertionError("the worker went on")
