"""Python programs without their imports: a process that has imported the libraries forks one for each.

Importing the libraries of a command takes longer than most tests of it. This process imports them once and
computes nothing. A line of JSON on its standard input makes a process,

    {"arguments": what would follow `python`, "environment", "directory", "stdout": file, "stderr": file}

whose id it prints; {"wait": id} is answered with the exit status. With any argument the server imports the
clients of the Hub too, which read their settings from the environment when they are imported. It imports
nothing of this project: a test may want to hide that.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
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
PLAIN += ["soundfile", "soxr", "jinja2", "multiprocess"]
OF_THE_HUB = ["transformers.modeling_utils", "transformers.image_processing_utils"]
OF_THE_HUB += ["transformers.processing_utils", "transformers.models.auto.modeling_auto"]
OF_THE_HUB += ["transformers.models.auto.image_processing_auto", "transformers.generation"]
OF_THE_HUB += ["transformers.models.auto.feature_extraction_auto", "datasets", "accelerate"]
OF_THE_HUB += ["transformers.feature_extraction_sequence_utils", "evaluate", "torchmetrics"]
OF_THE_HUB += ["transformers.models.llama.modeling_llama", "lpips"]
OF_THE_HUB += ["diffusers.pipelines.pipeline_utils"]


def main() -> None:
    """Serve until the input ends; in a forked process, become the program."""
    for name in PLAIN + (OF_THE_HUB if sys.argv[1:] else []):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # forked processes share these pages for as long as nobody writes to them
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        else:
            answer = os.fork()
            if not answer:
                finish(become, request)
        print(json.dumps(answer), flush=True)


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
