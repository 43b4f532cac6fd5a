"""Python programs without their imports: a process that has imported the libraries forks one for each.

Importing the libraries of a command takes longer than most tests of it. `python fork_server.py FOLDER` imports
them once, for all that ask, and computes nothing. A line of JSON to the socket FOLDER/plain makes a process,

    {"arguments": what would follow `python`, "environment", "directory", "stdout": file, "stderr": file}

whose id is the answer; {"wait": id} is answered with the exit status. Processes of the socket FOLDER/hub have
imported the clients of the Hub too, which read their settings from the environment when they are imported. The
server ends with its standard input. It imports nothing before the first request, and nothing of this project: a
test may want to hide that.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import socket
import sys
import threading
import traceback
import types
from collections.abc import Callable
from typing import NoReturn

# Those that read no setting of the Hub's clients from the environment, and those that do.
PLAIN = ["torch", "numpy", "torchvision", "torch._dynamo", "torch.distributed.fsdp"]
PLAIN += ["torch.utils.tensorboard", "pandas", "pyarrow.parquet", "skimage.metrics"]
PLAIN += ["sklearn.decomposition", "scipy.signal", "scipy.optimize", "matplotlib.pyplot"]
PLAIN += ["soundfile", "soxr", "jinja2", "multiprocess", "skimage.util", "PIL.AvifImagePlugin"]
PLAIN += ["torch.distributed.checkpoint", "torchvision.transforms.v2", "safetensors.torch"]
PLAIN += ["tokenizers", "yaml", "regex", "filelock", "httpx2", "requests", "aiohttp", "einx"]
OF_THE_HUB = ["transformers.modeling_utils", "transformers.image_processing_utils"]
OF_THE_HUB += ["transformers.processing_utils", "transformers.models.auto.modeling_auto"]
OF_THE_HUB += ["transformers.models.auto.image_processing_auto", "transformers.generation"]
OF_THE_HUB += ["transformers.models.auto.feature_extraction_auto", "datasets", "accelerate"]
OF_THE_HUB += ["transformers.feature_extraction_sequence_utils", "evaluate", "torchmetrics"]
OF_THE_HUB += ["transformers.models.llama.modeling_llama", "lpips"]
OF_THE_HUB += ["diffusers.pipelines.pipeline_utils"]


def main() -> None:
    """Import what all programs need and fork: one process serves each socket."""
    sockets = {kind: socket.socket(socket.AF_UNIX) for kind in ("plain", "hub")}
    for kind, listening in sockets.items():
        listening.bind(os.path.join(sys.argv[1], kind))
        listening.listen()
    print("listening", flush=True)
    if wait_for_one(*sockets.values()):
        load(PLAIN)
        kind = "plain" if os.fork() else "hub"
        if kind == "hub" and wait_for_one(sockets[kind]):
            load(OF_THE_HUB)
        serve(sockets[kind])


def wait_for_one(*sockets: socket.socket) -> bool:
    """Wait until somebody asks; false if standard input has ended instead."""
    return sys.stdin not in select.select([sys.stdin, *sockets], [], [])[0]


def load(names: list[str]) -> None:
    """Import modules for good: forked processes share their pages for as long as nobody writes to them."""
    for name in names:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()


def serve(listening: socket.socket) -> None:
    """Answer one request after the other; in a forked process, become the program."""
    while wait_for_one(listening):
        with listening.accept()[0] as connection:
            request = json.loads(connection.makefile().readline())
            if "wait" in request:
                answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
            else:
                answer = os.fork()
                if not answer:
                    connection.close()
                    listening.close()
                    finish(become, request)
            connection.sendall(json.dumps(answer).encode() + b"\n")


def become(request: dict) -> None:
    """Run a program as `python ARGUMENTS` would in this environment and directory."""
    for stream, name, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, request["stdout"], os.O_WRONLY | os.O_APPEND),
        (2, request["stderr"], os.O_WRONLY | os.O_APPEND),
    ):
        file = os.open(name, flags)
        os.dup2(file, stream)
        os.close(file)
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(request["environment"])
    path = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    first, *words = request["arguments"]
    directory = os.path.dirname(os.path.abspath(first)) if first not in ("-m", "-c") else ""
    sys.path[:1] = [directory or os.getcwd(), *path]
    if first == "-m":
        sys.argv = words
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *words[1:]]
        module = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(words[0], "<string>", "exec"), module.__dict__)
    else:
        sys.argv = [first, *words]
        runpy.run_path(first, run_name="__main__")


def finish(program: Callable[[dict], None], request: dict) -> NoReturn:
    """Run a program and end as Python does, but for the libraries' own threads: those were not forked."""
    status = 0
    try:
        program(request)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if error.code is not None and not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
