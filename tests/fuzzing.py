"""Fuzzing: what is done to inputs, and the account of what became of them."""

import copy
import json
import random
import resource
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
# More than any small input needs, and far less than what a hostile one declares.
ROOM = 4 << 30
# What stands in the place of a value in a configuration.
NASTY = [None, True, False, 0, 1, -1, 2, 3, 7, 32, 64, 10**12, -(10**12), 2**63, 10**400, 0.5, -0.0]
NASTY += [
    1e308,
    float("inf"),
    float("nan"),
    "",
    "x",
    "1",
    "simvq",
    "\0",
    "../../etc/passwd",
    "{{7*7}}",
]
NASTY += [
    [],
    [1],
    [0],
    [10**12],
    ["x"],
    [[]],
    [1, 2],
    [2] * 100,
    {},
    {"a": 1},
    {"basis_dim": 10**12},
]
NASTY += [{"levels": [10**6] * 3}, {"levels": []}, "__import__('os').system('true')", "ü" * 50]


def tries(fast: int, long: int) -> pytest.MarkDecorator:
    """So many inputs in `make test`, so many in `make soak`."""
    parameters = [
        pytest.param(fast, id="fast"),
        pytest.param(long, id="long", marks=pytest.mark.soak),
    ]
    return pytest.mark.parametrize("count", parameters)


@dataclass
class Account:
    """What became of the inputs."""

    name: str
    tried: int = 0
    refused: int = 0
    accepted: int = 0
    crashes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.tried:,} inputs tried, {self.refused:,} refused cleanly, "
            f"{self.accepted:,} accepted, {len(self.crashes)} crashes"
        )


def fuzz(name: str, inputs: Iterator, use: Callable) -> Account:
    """Use every input; whatever is no clean error is a crash. Prints the account and fails on crashes.

    Clean is an OSError, or a ValueError of this project or of transformers, with a message. Memory is limited
    to ROOM above what the process has, so that making room for a declared size is a crash too.
    """
    account = Account(name)
    with _limited_memory():
        for one in inputs:
            account.tried += 1
            try:
                use(one)
                account.accepted += 1
            except Exception as error:
                if _clean(error):
                    account.refused += 1
                else:
                    where = traceback.extract_tb(error.__traceback__)[-1]
                    shown = repr(one)[:300]
                    account.crashes.append(
                        f"{error!r:.300} at {where.filename}:{where.lineno} of {shown}"
                    )
                    if len(account.crashes) == 10:
                        break
    print(account, flush=True)
    assert not account.crashes, "\n".join([str(account), *account.crashes])
    return account


def _clean(error: Exception) -> bool:
    if not str(error).strip():
        return False
    if isinstance(error, OSError):
        return True
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    ours = raised_in.is_relative_to(REPOSITORY) and ".venv" not in raised_in.parts
    if isinstance(error, TypeError):  # of a misspelt field or option
        return raised_in.name == "configuration_checks.py" or "unexpected keyword" in str(error)
    if isinstance(error, RuntimeError):  # what transformers says of weights of another shape
        return "ignore_mismatched_sizes" in str(error)
    # Its checks come before ours, and name what is wrong.
    return isinstance(error, ValueError) and (ours or "transformers" in raised_in.parts)


@contextmanager
def _limited_memory():
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def mutated_bytes(content: bytes, source: random.Random) -> bytes:
    """A file with some bytes changed, cut off, left out, doubled or put in."""
    data = bytearray(content)
    for _ in range(source.choice([1, 1, 2, 8, 64])):
        if not data:
            break
        # Headers are short and matter most.
        place = source.randrange(min(len(data), source.choice([16, 64, 512, len(data)])))
        kind = source.randrange(6)
        if kind == 0:
            data[place] ^= 1 << source.randrange(8)
        elif kind == 1:
            data[place] = source.choice([0, 1, 127, 128, 255])
        elif kind == 2:
            del data[source.randrange(place, len(data)) :]
        elif kind == 3:
            del data[place : place + source.randrange(1, 40)]
        elif kind == 4:
            data[place:place] = data[place : place + source.randrange(1, 40)]
        else:
            data[place : place + 4] = source.choice([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"])
    return bytes(data)


def mutated_tree(tree: dict, source: random.Random, spared: set[str] = frozenset()) -> dict:
    """A configuration with some values replaced, fields left out, misspelt or added; not those spared."""
    tree = json.loads(json.dumps(tree))
    for _ in range(source.choice([1, 1, 1, 2, 4])):
        node = tree
        nested = [v for k, v in node.items() if isinstance(v, dict) and v and k not in spared]
        if nested and source.random() < 0.3:
            node = source.choice(nested)
        key = source.choice([k for k in node if k not in spared] or ["codebook_size"])
        kind = source.randrange(8)
        if kind < 5:
            node[key] = copy.deepcopy(source.choice(NASTY))
        elif kind == 5:
            node.pop(key, None)
        elif kind == 6:
            node[key + "s"] = node.get(key)
        else:
            node[source.choice(["hub", "_class", "unheard of", ""])] = copy.deepcopy(
                source.choice(NASTY)
            )
    return tree
