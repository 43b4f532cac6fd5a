"""What the commands say: their own lines, and of the libraries' warnings alone."""

import logging

import transformers

CHATTY = ("httpx", "httpx2", "datasets", "accelerate", "transformers", "diffusers")
CHATTY += ("PIL", "numba", "matplotlib")


def error_line(error: Exception) -> str:
    """What a command ends with when something is wrong."""
    text = str(error)
    if text.startswith("Caught "):  # in a data loader's worker, which sends its traceback along
        text = text.rstrip().splitlines()[-1].partition(": ")[2]
    return f"error: {text}"


def quiet_logs() -> None:
    """Log this project's lines as they are, and libraries from warnings on."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
