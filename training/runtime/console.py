"""Frame of every command: settings, log, processes, errors in one line."""

import logging
import sys
from collections.abc import Callable

import transformers

from hub_cards.user_error import one_line_errors
from training.runtime.processes import end_processes, join_processes
from training.runtime.settings import parse_settings
from training.runtime.worker_memory import worker_error

CHATTY = ("httpx", "httpx2", "datasets", "accelerate", "transformers", "diffusers")
CHATTY += ("PIL", "numba", "matplotlib")

Groups = dict[str, type]


def command(
    groups: Groups | Callable[[list[str]], tuple[Groups, list[str]]],
    body: Callable[..., None],
    description: str,
    *,
    with_processes: bool = True,
) -> None:
    """Run a command: parse its settings, call its body, end its processes.

    Mistakes of the user end in one line and exit status 1, and so does the death of a data loader's worker.

    Args:
        groups: dataclasses of the settings by name, or a function that makes these and the words to be parsed
            from the words of the command line.
        body: called with the settings by these names and, as `accelerator`, the processes of the launch.
        description: for --help.
        with_processes: False for a body that takes no accelerator.
    """
    quiet_logs()
    with one_line_errors():
        try:
            words = None
            if callable(groups):
                groups, words = groups(sys.argv[1:])
            settings = parse_settings(groups, description, words)
            if not with_processes:
                body(**settings)
                return
            accelerator = join_processes()
            body(**settings, accelerator=accelerator)
            end_processes(accelerator)
        except RuntimeError as error:
            text = worker_error(error)
            if text is None:
                raise
            sys.exit(f"error: {text}")


def quiet_logs() -> None:
    """Log this project's lines as they are, and libraries from warnings on."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
