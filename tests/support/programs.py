"""Python programs in processes of their own, at the price of a fork (fork_server.py)."""

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

REPOSITORY = Path(__file__).parents[2]
SERVER = Path(__file__).with_name("fork_server.py")
# What the Hub's clients read once, when they are imported.
READ_AT_IMPORT = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "DIFFUSERS_", "HUB_")
CPU = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
PLAIN_LAUNCH = ("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")
ONE_PROCESS = ("--num_processes", "1")
TWO_RANKS = ("--multi_gpu", "--num_processes", "2")


def _of_the_hub(environment: Mapping[str, str]) -> dict[str, str]:
    read = {k: v for k, v in environment.items() if k.startswith(READ_AT_IMPORT)}
    return {k: v for k, v in read.items() if k != "HF_TOKEN"}  # which is read when it is used


# What the server's own clients have read, before any test changes this.
OF_THE_SERVER = _of_the_hub(os.environ | CPU)
# Where the server of this run of the tests listens, its workers included.
SERVER_FOLDER = "TESTS_FORK_SERVER"


@contextlib.contextmanager
def fork_server() -> Iterator[None]:
    """Let programs be made, here and in the processes that are started meanwhile."""
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(
            [sys.executable, str(SERVER), folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | CPU,
        ) as process,
    ):
        process.stdout.readline()  # it listens
        os.environ[SERVER_FOLDER] = folder
        yield
        del os.environ[SERVER_FOLDER]
        process.stdin.close()


def _ask(kind: str, request: dict) -> int:
    """Send a request to the server and return the answer."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.path.join(os.environ[SERVER_FOLDER], kind))
        connection.sendall(json.dumps(request).encode() + b"\n")
        return json.loads(connection.makefile().readline())


class Program:
    """A running `python ARGUMENTS` (a script, -m or -c), as subprocess.Popen has it."""

    def __init__(
        self,
        *arguments: str | os.PathLike,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike | None = None,
    ):
        environment = dict(os.environ | CPU if env is None else env) | {"OMP_NUM_THREADS": "1"}
        self.args = [sys.executable, *map(str, arguments)]
        self.returncode: int | None = None
        self._kind = "hub" if _of_the_hub(environment) == OF_THE_SERVER else "plain"
        self._files = [tempfile.NamedTemporaryFile("r+") for _ in range(2)]  # noqa: SIM115
        request = {
            "arguments": self.args[1:],
            "environment": environment,
            "directory": str(cwd or os.getcwd()),
            "stdout": self._files[0].name,
            "stderr": self._files[1].name,
        }
        self.pid = _ask(self._kind, request)
        self._end = os.pidfd_open(self.pid)

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *_) -> None:
        self.kill()
        self.wait()

    def fileno(self) -> int:
        """Descriptor that becomes readable when the program has ended, for select."""
        return self._end

    def poll(self) -> int | None:
        """Exit status, None while it runs."""
        if self.returncode is None and select.select([self], [], [], 0)[0]:
            self.returncode = _ask(self._kind, {"wait": self.pid})
            os.close(self._end)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it, unless it has ended."""
        self.send_signal(9)

    def wait(self, timeout: float = 300) -> subprocess.CompletedProcess:
        """Wait for the end.

        Raises:
            subprocess.TimeoutExpired: after the program was killed.
        """
        return _finish([self], timeout)

    def output(self) -> tuple[str, str]:
        """Return what it has printed so far: standard output, standard error."""
        stdout, stderr = (Path(file.name).read_text() for file in self._files)
        return stdout, stderr


def run(
    *arguments: str | os.PathLike,
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike | None = None,
    timeout: float = 300,
) -> subprocess.CompletedProcess:
    """Run `python ARGUMENTS` (a script, -m or -c) to its end."""
    return Program(*arguments, env=env, cwd=cwd).wait(timeout)


def launch(
    *words: str | os.PathLike,
    launcher: tuple[str, ...] = ONE_PROCESS,
    cwd: str | os.PathLike | None = None,
    timeout: float = 300,
    **environment: str,
) -> subprocess.CompletedProcess:
    """Run a script as `accelerate launch LAUNCHER WORDS` does, on the CPU.

    The environment of the processes comes from Accelerate's own functions; forks stand for those of its agent.
    """
    parser = launch_command_parser()
    script = list(map(str, words))
    arguments, *_ = _validate_launch_command(parser.parse_args([*PLAIN_LAUNCH, *launcher, *script]))
    path = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = os.environ | CPU | {"PYTHONPATH": os.pathsep.join(path)} | environment
    if not arguments.multi_gpu and not arguments.use_fsdp:
        _, theirs = prepare_simple_launcher_cmd_env(arguments)
        return run(*script, env=own | _changed(theirs), cwd=cwd, timeout=timeout)
    count, port = arguments.num_processes, free_port()
    own |= _changed(prepare_multi_gpu_env(arguments)) | {"WORLD_SIZE": str(count)}
    own |= {"LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    programs = [
        Program(*script, env=own | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, cwd=cwd)
        for rank in range(count)
    ]
    return _finish(programs, timeout)


def _finish(programs: list[Program], timeout: float) -> subprocess.CompletedProcess:
    """Wait for programs; the failure of one ends the others, as torch's agent does it."""
    deadline = time.monotonic() + timeout
    status, late = 0, False
    while running := [program for program in programs if program.poll() is None]:
        ended = [program.returncode for program in programs if program.returncode]
        late = time.monotonic() > deadline
        if ended or late:
            for program in running:
                program.kill()
            # Asked again by kill, one may turn out to have ended meanwhile.
            running = [program for program in running if program.returncode is None]
        status = status or next(iter(ended), 0)
        select.select(running, [], [], 1 if ended or late else deadline - time.monotonic())
    stdout, stderr = ("".join(parts) for parts in zip(*(p.output() for p in programs), strict=True))
    if late:
        raise subprocess.TimeoutExpired(programs[0].args, timeout, stdout, stderr)
    status = status or next((p.returncode for p in programs if p.returncode), 0)
    return subprocess.CompletedProcess(programs[0].args, status, stdout, stderr)


def free_port() -> str:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return str(taken.getsockname()[1])


def _changed(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what Accelerate has added to this process's environment."""
    return {k: str(v) for k, v in environment.items() if os.environ.get(k) != str(v)}
