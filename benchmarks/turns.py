"""Timing of things that take turns, each in a process of its own: what runs beside them meets all alike."""

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection

from tqdm.auto import tqdm


def take_turns(
    servers: dict[str, tuple[Callable, tuple]], runs: int, label: str
) -> dict[str, list]:
    """Return what each answered, `runs` times; a first turn, which warms up, is left out.

    Args:
        servers: by name, a function and its arguments. A connection is added to these: the function answers
            every True that it receives with a value, and ends at False.
        label: of the progress bar.
    """
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    for name, (target, arguments) in servers.items():
        pipes[name], other = context.Pipe()
        processes.append(context.Process(target=target, args=(*arguments, other), daemon=True))
        processes[-1].start()
        other.close()  # so that the death of the process ends the wait for its answer
    answers: dict[str, list] = {name: [] for name in servers}
    for turn in tqdm(range(runs + 1), desc=label, unit="turn"):
        for name, pipe in pipes.items():
            pipe.send(True)
            answer = pipe.recv()
            if turn:
                answers[name].append(answer)
    for pipe, process in zip(pipes.values(), processes, strict=True):
        pipe.send(False)
        process.join()
    return answers
