"""PESQ in its own process: a death is a value that is missing, and what comes after it is right."""

import logging
import math
import sys

import numpy as np
import psutil
import pytest
import torch

from training.metrics import pesq_process
from training.metrics import speech as speech_metrics
from training.metrics.pesq_process import PesqProcess
from training.metrics.speech import LOADERS, SpeechPair, pesq_metric
from training.runtime.errors import MissingWeights

RATE = 16_000


def words(count: int) -> tuple[np.ndarray, np.ndarray]:
    """So many utterances of 0.3 s with 0.25 s between them, and the same with faint noise."""
    source = np.random.default_rng(0)
    word = np.hanning(4_800) * source.standard_normal(4_800) * 0.3
    clean = np.tile(np.concatenate([word, np.zeros(4_000)]), count).astype(np.float32)
    return clean, clean + 0.001 * source.standard_normal(len(clean)).astype(np.float32)


@pytest.fixture
def pesq():
    process = PesqProcess()
    yield process
    process.close()


@pytest.mark.slow
def test_a_death_is_a_missing_value_and_the_next_is_right(pesq, caplog):
    clean, noisy = words(6)
    before = pesq.score(clean, noisy)
    first = pesq.process.pid
    maps = " ".join(m.path for m in psutil.Process(first).memory_maps())
    assert "numpy" in maps and "torch" not in maps  # it starts quickly
    with caplog.at_level(logging.WARNING):
        assert math.isnan(pesq.score(*words(65)))
    assert "PESQ died (SIG" in caplog.text and "of a recording of 35.8 s" in caplog.text
    assert pesq.score(clean, noisy) == before and pesq.process.pid != first
    pesq.process.kill()  # by somebody else, between two recordings
    pesq.process.wait()
    assert pesq.score(clean, noisy) == before


def test_one_that_takes_too_long_is_ended(pesq, monkeypatch):
    clean, noisy = words(40)
    pesq.score(clean[:8_000], noisy[:8_000])
    monkeypatch.setattr(pesq_process, "SECONDS_AT_LEAST", 0.05)
    monkeypatch.setattr(pesq_process, "SECONDS_PER_SECOND", 0)
    assert math.isnan(pesq.score(clean, noisy)) and pesq.process is None


def test_it_says_when_it_cannot_be_started_or_is_not_there(pesq, monkeypatch, tmp_path):
    (tmp_path / "script.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr(pesq_process, "__file__", str(tmp_path / "script.py"))
    with pytest.raises(RuntimeError, match=r"cannot be started \(exit status 3\)"):
        pesq.score(*words(1))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingWeights, match="pip install pesq"):
        LOADERS["pesq"](torch.device("cpu"))


def test_the_metric_is_that_process():
    clean, noisy = words(6)
    found = pesq_metric(SpeechPair(clean, noisy, RATE))["pesq"]
    assert speech_metrics._PESQ.process.args[0] == sys.executable and 1 < found < 4.65
