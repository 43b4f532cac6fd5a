"""What the commands say, and how they end."""

import logging
from dataclasses import dataclass

import pytest
import torch
from torch.utils.data import DataLoader

from hub_cards.hub_commit import HubError
from hub_cards.user_error import error_line
from training.loop.finite import DivergedError
from training.runtime.console import command
from training.runtime.errors import MissingWeights
from training.runtime.settings import SettingsError, setting


class Broken(torch.utils.data.Dataset):
    """Nothing in it can be read."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int):
        raise OSError("photo.png: broken")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_of_a_worker_is_one_line_too(num_workers):
    with pytest.raises(OSError) as caught:
        next(iter(DataLoader(Broken(), num_workers=num_workers)))
    assert error_line(caught.value) == "error: photo.png: broken"


@dataclass
class Number:
    """A number."""

    number: int = setting(1, "whole")


ERRORS = [
    *(
        HubError("no login"),
        DivergedError("nan"),
        MissingWeights("no LPIPS"),
        SettingsError("number"),
    ),
    *(ValueError("of a library"), OSError("no file"), ImportError("no package")),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_of_the_user_end_a_command_in_one_line(error, monkeypatch, caplog):
    def body(settings: Number) -> None:
        assert settings.number == 3
        raise error

    def run() -> None:
        command({"settings": Number}, body, "", with_processes=False)

    monkeypatch.setattr("sys.argv", ["x", "number=3"])
    with pytest.raises(SystemExit) as end:
        run()
    assert end.value.code == f"error: {error}"
    caplog.set_level(logging.DEBUG)
    with pytest.raises(type(error)):
        run()


@pytest.mark.parametrize(
    ("text", "ends", "said"),
    [
        ("DataLoader worker (pid 7) is killed by signal: Bus error.", SystemExit, "shared memory"),
        ("a fault of this project", RuntimeError, "a fault of this project"),
    ],
)
def test_only_a_worker_is_told_of_other_runtime_errors(text, ends, said, monkeypatch):
    def body(settings: Number) -> None:
        raise RuntimeError(text)

    monkeypatch.setattr("sys.argv", ["x"])
    with pytest.raises(ends, match=said):
        command({"settings": Number}, body, "", with_processes=False)


def test_groups_may_follow_from_the_words(monkeypatch):
    monkeypatch.setattr("sys.argv", ["x", "7"])
    found = []
    command(
        lambda words: ({"settings": Number}, [f"number={words[0]}"]),
        lambda settings: found.append(settings.number),
        "",
        with_processes=False,
    )
    assert found == [7]
