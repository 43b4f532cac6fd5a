"""Runs that are killed, stopped and poisoned end as if nothing had happened (kill_runs.py)."""

import json
from pathlib import Path

import pytest

from tests.support.programs import run


def kill(*arguments: str, timeout: float) -> list[dict]:
    """One dict a kind and experiment; see kill_runs.py."""
    script = Path(__file__).parents[1] / "support" / "kill_runs.py"
    result = run(script, *arguments, timeout=timeout)
    print(result.stdout)  # the seeds, for those who want to see it again
    assert result.returncode == 0, result.stdout + result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.slow
def test_runs_that_are_killed_or_stopped_end_as_if_they_had_not_been():
    """Pictures streamed to two processes, of which one gets the signal and the NaN."""
    killed, stopped, spoiled = kill(
        *("--kinds", "image_stream_ranks", "--kills", "2"),
        *("--signals", "SIGTERM", "--spoil"),
        timeout=300,
    )
    assert killed["kills"] == 2 and killed["finished"] >= 1
    assert stopped["status"] == [75, 75] and stopped["said_so"]
    assert spoiled["status"] == [0, 0] and spoiled["skipped"] == [[4], [4]]
    assert "pixel_values on rank 1" in spoiled["cause"]


@pytest.mark.soak
@pytest.mark.parametrize(
    "kind",
    [
        f"{modality}{how}"
        for modality in ("image", "audio")
        for how in ("", "_stream", "_ranks", "_stream_ranks")
    ],
)
def test_kills_without_number(kind):
    results = kill(
        *("--kinds", kind, "--kills", "40", "--signals", "SIGTERM,SIGUSR1,SIGINT", "--spoil"),
        timeout=3600,
    )
    killed, terminated, signalled, interrupted, spoiled = results
    assert killed["kills"] == 40 and killed["in_a_write"] > 0
    ranks = 2 if kind.endswith("ranks") else 1
    assert terminated["status"] == signalled["status"] == [75] * ranks
    assert interrupted["status"] == [130] * ranks
    assert spoiled["status"] == [0] * ranks and spoiled["skipped"] == [[4]] * ranks
