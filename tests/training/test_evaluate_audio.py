"""The audio evaluator: means and failures of known signals, and the real command on two ranks."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from tests.support.programs import ONE_PROCESS, TWO_RANKS, launch
from training.evaluation.audio import AudioEvaluationSettings, evaluate, load_metrics
from training.metrics.speech import stoi_metric
from training.runtime.errors import MissingWeights
from training.runtime.settings import SettingsError

REPOSITORY = Path(__file__).parents[2]


class Louder(nn.Module):
    """A tokenizer whose reconstruction is the recording times a factor; one code a frame, counting up."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor
        self.config = SimpleNamespace(
            codebook_size=8,
            num_quantizers=1,
            sampling_rate=16_000,
            target_bandwidths=[4 * 3 / 1000],
        )

    def forward(self, waveforms, num_quantizers=None):
        codes = torch.arange(waveforms.shape[-1] // 4000)[None, None] % 8
        return SimpleNamespace(audio_values=waveforms * self.factor, audio_codes=codes)


def recordings(*lengths: int) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(1, 1, length, generator=generator) * 0.1 for length in lengths]
    return [{"input_values": x, "valid": torch.tensor([True])} for x in noise]


@pytest.fixture
def accelerator(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return Accelerator()


def level(pair):
    """Loudness of the reconstruction against the original's."""
    original, decoded = pair.trimmed
    return {"level": float(np.abs(decoded).sum() / np.abs(original).sum())}


def test_means_usage_and_bitrate(accelerator):
    findings = evaluate(Louder(0.5), recordings(8000, 16_000), accelerator, {"level": level})
    assert findings.samples == 2 and not findings.failures
    assert findings.metrics["level"] == pytest.approx(0.5, abs=1e-3)
    assert findings.metrics["bitrate"] == pytest.approx(4 * 3 / 1000)
    assert findings.metrics["utilisation"] == 0.5  # codes 0 to 3 of 8
    frequencies = np.array([2, 2, 1, 1]) / 6
    assert findings.metrics["perplexity"] == pytest.approx(
        np.exp(-(frequencies * np.log(frequencies)).sum())
    )


def test_failures_are_counted_and_left_out_of_the_mean(accelerator):
    """Two of three have a score; a mean that took the third as -1 or 0 would be lower."""
    data = recordings(16_000, 16_000, 16_000)
    data[1]["input_values"] *= 0
    data.append(
        {"input_values": torch.zeros(1, 1, 1), "valid": torch.tensor([False])}
    )  # unreadable
    findings = evaluate(Louder(1.0), data, accelerator, {"stoi": stoi_metric})
    assert findings.samples == 3 and findings.failures == {"stoi": 1}
    assert findings.metrics["stoi"] == pytest.approx(1, abs=1e-4)


def test_the_fingerprint_is_that_of_the_samples_in_any_order(accelerator):
    data = recordings(8000, 12_000)
    prints = [
        evaluate(Louder(factor), some, accelerator, {}).fingerprint
        for factor, some in ((1.0, data), (0.5, data[::-1]), (1.0, data[:1]))
    ]
    assert prints[0] == prints[1] != prints[2]


def test_nothing_to_evaluate(accelerator):
    with pytest.raises(ValueError, match="no recording"):
        evaluate(Louder(1.0), [], accelerator, {"level": level})


def test_a_metric_that_cannot_be_had_leaves_the_rest(monkeypatch):
    def absent(device, weights=None):
        raise MissingWeights("no weights: put them there")

    monkeypatch.setitem(load_metrics.__globals__["LOADERS"], "utmos", absent)
    settings = AudioEvaluationSettings(model="x", metrics=["pesq", "utmos", "stoi"])
    metrics, missing = load_metrics(settings, torch.device("cpu"))
    assert list(metrics) == ["pesq", "stoi"] and missing == {"utmos": "no weights: put them there"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ""}, "name a folder"),
        ({"metrics": ["mos"]}, "metrics: there are pesq, stoi.*'mos'"),
        ({"utmos_weights": "nowhere.pt"}, "utmos_weights: there is no file nowhere.pt"),
    ],
)
def test_mistakes_in_settings(changes, message):
    with pytest.raises(SettingsError, match=message):
        AudioEvaluationSettings(**({"model": "x"} | changes))


@pytest.mark.soak  # the machinery is that of images, which `make test` runs on two ranks
def test_two_ranks_find_what_one_process_finds(tmp_path):
    """The command, with recordings that the ranks cannot share evenly, and a broken one."""
    from modeling_simvq import SimVQAudioConfig, SimVQAudioModel

    torch.manual_seed(0)
    config = SimVQAudioConfig(
        num_filters=4,
        downsampling_ratios=[4, 5, 8],
        num_lstm_layers=0,
        codebook_size=64,
        codebook_dim=16,
        hidden_size=32,
        intermediate_size=32,
        num_decoder_layers=1,
        n_fft=640,
    )
    SimVQAudioModel(config).save_pretrained(tmp_path / "model")
    folder = tmp_path / "speech" / "validation"
    folder.mkdir(parents=True)
    demo = sorted((REPOSITORY / "training" / "demo" / "speech" / "train").glob("*.flac"))
    demo = sorted(demo, key=lambda path: path.stat().st_size)[:5]
    for path in demo:
        shutil.copy(path, folder)
    (folder / "broken.flac").write_bytes(b"no recording")
    command = [str(REPOSITORY / "training" / "evaluate_audio.py"), f"model={tmp_path / 'model'}"]
    command += [f"dataset={tmp_path / 'speech'}", "config_name=null", "num_workers=0"]
    command += ["validation_split=validation", "metrics=[pesq,stoi]"]
    found = []
    for ranks in (ONE_PROCESS, TWO_RANKS):
        done = launch(*command, launcher=ranks)
        assert done.returncode == 0, done.stderr
        assert f"{ranks[-1]} process(es)" in done.stderr and "broken.flac" in done.stderr
        found.append(json.loads((tmp_path / "model" / "evaluation.json").read_text()))
    one, two = found
    assert one["dataset"]["samples"] == two["dataset"]["samples"] == len(demo)
    assert one["metrics"] == pytest.approx(two["metrics"], rel=1e-9)
    assert one["intervals"] == pytest.approx(two["intervals"], rel=1e-6)
    assert one["fingerprint"] == two["fingerprint"]
    assert one["metrics"]["bitrate"] == pytest.approx(24_000 / 160 * math.log2(64) / 1000)
    page = (tmp_path / "model" / "evaluation.md").read_text()
    assert "| PESQ" in page and "wide band" in page and f"{len(demo)} recordings." in page
