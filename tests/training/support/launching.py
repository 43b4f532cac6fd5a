"""Starts training scripts on several processes of this machine's CPU."""

import os
import socket
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[3]
TWO_RANKS = ("--multi_gpu", "--num_processes", "2", "--num_machines", "1")


def launch(
    *words: str, launcher: tuple = TWO_RANKS, timeout: int = 300, **environment: str
) -> subprocess.CompletedProcess:
    """Run `accelerate launch` with plain settings, as docs/multi_node.md has it for rehearsals on CPU."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", *launcher]
    # Other launches may run at the same time.
    if launcher and "--main_process_port" not in launcher:
        command += ["--main_process_port", free_port()]
    command += words
    path = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    own |= {"PYTHONPATH": os.pathsep.join(path)}
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | own | environment,
    )


def free_port() -> str:
    """A port of this machine that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return str(taken.getsockname()[1])
