"""The audio trainer as a user runs it, on real speech; recipe, figures, pictures, errors."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import soundfile
import torch
from PIL import Image
from transformers import AutoFeatureExtractor, AutoModelForAudioTokenization

from hub_cards.sheets import spectrogram_sheet
from modeling_simvq import SimVQAudioModel
from tests.support.programs import ONE_PROCESS, TWO_RANKS, launch
from training.data.recordings import AudioDataConfig
from training.export_checkpoint import export_checkpoint
from training.losses.audio import AudioLoss
from training.recipes.audio import (
    AudioLoopSettings,
    AudioLossSettings,
    AudioModelSettings,
    build_audio_recipe,
    si_sdr,
)
from training.recipes.encoder_start import start_from_data
from training.runtime.settings import SettingsError, parse_settings

REPOSITORY = Path(__file__).parents[2]
SPEECH = REPOSITORY / "training" / "demo" / "speech"
CONFIGS = REPOSITORY / "training" / "configs"
TINY = [
    "num_workers=0",
    "clip_seconds=0.16",
    "num_filters=2",
    "codebook_size=64",
    "codebook_dim=16",
    "hidden_size=32",
    "intermediate_size=64",
    "num_decoder_layers=1",
    "period_channels=1",
    "resolution_channels=1",
    "dac_channels=1",
    "config_name=null",
    "train_split=train",
    "validation_split=validation",
    "batch_size=2",
    "epochs=100",
    "warmup_steps=2",
    "log_every=2",
]


def train(*words: str, processes: int = 1, **more: str) -> subprocess.CompletedProcess:
    launcher = TWO_RANKS if processes > 1 else ONE_PROCESS
    script = REPOSITORY / "training" / "train_audio.py"
    return launch(script, *TINY, *words, launcher=launcher, **more)


@pytest.mark.slow
def test_train_resume_publish_and_load(tmp_path, hub):
    data = tmp_path / "speech"
    shutil.copytree(SPEECH, data)
    (data / "train" / "broken.wav").write_bytes(b"RIFF, but nothing follows")
    (data / "train" / "empty.flac").write_bytes(b"")
    run = tmp_path / "run"
    # 13 files in four batches: whatever the order, one of the two is met.
    first = train(
        f"dataset={data}", "batch_size=3", f"output_dir={run}", "max_steps=4", "save_every=2"
    )
    assert first.returncode == 0, first.stderr
    assert "broken.wav" in first.stderr or "empty.flac" in first.stderr
    assert "unreadable" in first.stderr  # counted in the report
    figures = [json.loads(line) for line in (run / "figures.jsonl").read_text().splitlines()]
    assert figures[-1]["step"] == 4
    assert figures[-1].keys() >= {"mel_distance", "si_sdr", "utilisation", "perplexity"}
    sound, rate = soundfile.read(run / "sounds" / "step-00000004-reconstruction-0.wav")
    assert rate == 24000 and len(sound) == 3840
    assert Image.open(run / "spectrogram-0" / "step-00000004.png").size[0] > 500
    assert any((run / "tensorboard").rglob("events*"))

    more = ["max_steps=6", "--resume", "latest", "--push-to-hub", "hub_model_id=org/voices"]
    environment = hub.environment(tmp_path / "home")
    again = train(f"dataset={data}", "batch_size=3", f"output_dir={run}", *more, **environment)
    assert again.returncode == 0, again.stderr
    assert "at step 4" in again.stderr and f"published: {hub.url}/org/voices" in again.stderr
    assert {"modeling_simvq_audio.py", "samples/original.wav"} <= set(hub.files("org/voices"))

    exported = export_checkpoint(run / "checkpoints" / "step-00000006", tmp_path / "exported")
    for name in ("model.safetensors", "preprocessor_config.json"):
        assert (exported / name).read_bytes() == (run / "model" / name).read_bytes()
    model = AutoModelForAudioTokenization.from_pretrained(run / "model")
    extractor = AutoFeatureExtractor.from_pretrained(run / "model")
    assert isinstance(model, SimVQAudioModel) and not model.quantizer.basis.requires_grad
    waveform, rate = soundfile.read(next((SPEECH / "validation").iterdir()), dtype="float32")
    inputs = extractor(waveform, sampling_rate=rate, return_tensors="pt")
    with torch.no_grad():
        codes = model.encode(**inputs).audio_codes
        decoded = model.decode(audio_codes=codes).audio_values
    assert codes.shape == (1, 1, -(-len(waveform) // 320))
    assert decoded.shape == (1, 1, codes.shape[-1] * 320) and decoded.isfinite().all()


@pytest.mark.soak  # the machinery is that of images, which `make test` runs on two ranks
def test_two_processes_share_the_work(tmp_path):
    done = train(f"dataset={SPEECH}", f"output_dir={tmp_path / 'run'}", "max_steps=2", processes=2)
    assert done.returncode == 0, done.stderr
    assert "2 process(es)" in done.stderr
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_impossible_clips_are_named():
    model, loss = AudioModelSettings(), AudioLossSettings()
    for seconds, named in ((0.9999, "hop length 320; 1 would be"), (0.08, "more than 2048")):
        data = AudioDataConfig(dataset=str(SPEECH), clip_seconds=seconds)
        with pytest.raises(SettingsError, match=named):
            build_audio_recipe(model, data, loss, batch_size=1, seed=0)


def test_warm_up_and_clipping_are_on_by_default():
    loop = AudioLoopSettings()
    assert loop.warmup_steps > 0 and loop.max_grad_norm == 1.0


def settings_of(file: Path) -> dict:
    groups = {
        "data": AudioDataConfig,
        "model": AudioModelSettings,
        "loss": AudioLossSettings,
        "loop": AudioLoopSettings,
    }
    return parse_settings(groups, "", ["--config", str(file), f"dataset={SPEECH}"])


OF_24K_AND_16K = sorted([*CONFIGS.glob("libritts*.yaml"), *CONFIGS.glob("streaming*.yaml")])


@pytest.mark.parametrize("file", OF_24K_AND_16K, ids=lambda f: f.stem)
def test_published_configurations(file):
    found = re.fullmatch(r"(libritts|streaming)(24|16)k_k(\d+)(?:_\w+)?", file.stem)
    settings = settings_of(file)
    config = settings["model"].config(settings["data"].sampling_rate)
    assert config.streaming == (found.group(1) == "streaming")
    assert config.sampling_rate == int(found.group(2)) * 1000
    assert config.codebook_size == int(found.group(3))
    assert settings["data"].clip_samples % config.hop_length == 0
    assert settings["loop"].warmup_steps >= 1000 and settings["loop"].max_grad_norm == 1.0
    assert settings["loss"] == AudioLossSettings()


@pytest.mark.parametrize(
    "file",
    [CONFIGS / "music44k_k65536.yaml", CONFIGS / "speech48k_k8192.yaml"],
    ids=lambda f: f.stem,
)
def test_configurations_of_higher_rates(file):
    """Their codes last as long as the paper's, clips are whole codes, and no mel band is empty."""
    found = re.fullmatch(r"(?:music|speech)(44|48)k_k(\d+)", file.stem)
    settings = settings_of(file)
    data, loss = settings["data"], settings["loss"]
    config = settings["model"].config(data.sampling_rate)
    assert data.sampling_rate == {"44": 44_100, "48": 48_000}[found.group(1)]
    assert config.codebook_size == int(found.group(2))
    assert config.frame_rate == 75 and config.n_fft == 4 * config.hop_length
    assert data.clip_samples % config.hop_length == 0
    assert data.clip_samples > max(2048, *(window // 2 for window in loss.mel_windows))
    for mel in AudioLoss(sampling_rate=data.sampling_rate, mel_windows=loss.mel_windows).mels:
        assert (mel.filters.amax(dim=1) > 0).all()


@pytest.mark.slow
def test_the_start_from_data_standardises_every_layer():
    torch.manual_seed(0)
    encoder = SimVQAudioModel(AudioModelSettings(num_filters=4).config()).encoder
    clips = torch.randn(4, 1, 6400) * 0.01
    before, _ = encoder(clips)
    start_from_data(encoder, clips)
    after, _ = encoder(clips)
    assert before.std(dim=(0, 2)).max() < 0.1
    torch.testing.assert_close(after.std(dim=(0, 2)), torch.ones(512), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(after.mean(dim=(0, 2)), torch.zeros(512), rtol=0, atol=1e-3)


def test_si_sdr_of_known_signals():
    torch.manual_seed(0)
    signal, noise = torch.randn(2, 1, 24000).unbind()
    noise -= (noise * signal).sum() / signal.square().sum() * signal
    noise *= signal.norm() / noise.norm()
    for decibels in (0, 10, 20):
        mixed = 3 * (signal + noise * 10 ** (-decibels / 20))
        assert si_sdr(mixed, signal).item() == pytest.approx(decibels, abs=0.05)
    assert si_sdr(torch.zeros(1, 100), signal[:, :100]).isfinite().all()


def test_the_spectrogram_shows_a_tone_at_its_height():
    time = torch.arange(24000) / 24000
    high, low = torch.sin(2 * torch.pi * 6000 * time), torch.sin(2 * torch.pi * 500 * time)
    picture = spectrogram_sheet({"high": high, "low": low}, 24000)
    assert picture.shape[0] == 3 and picture.min() >= 0 and picture.max() <= 1
    # The brightest row of each panel: the high tone lies nearer to its panel's top.
    brightness, _, blue = picture[:, :, 300:700].mean(dim=2)
    brightness[blue > 0.85] = 0  # paper and letters; no colour of the scale is so blue
    half = len(brightness) // 2
    assert brightness[:half].argmax() / half < brightness[half:].argmax() / half
