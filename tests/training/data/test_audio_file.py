"""Decoding recordings: parity with the original, every format, crops, resampling, broken files."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from tests.training.support.recordings import RATE, broken_recordings, encoded, noise
from training.data.reader import UnreadableSample
from training.data.recordings import decode_audio

FIXTURE = Path(__file__).parents[2] / "fixtures" / "data_audio"


def cell(*args, **options) -> dict:
    return {"bytes": encoded(*args, **options), "path": None}


@pytest.mark.parametrize("name", ["long24", "short24", "sr16", "stereo24"])
def test_waveforms_equal_the_originals_to_the_bit(name):
    wanted = load_file(FIXTURE / "outputs.safetensors")
    whole = wanted[f"test.{name}.wav"]
    file = {"bytes": None, "path": str(FIXTURE / "wav" / f"{name}.wav")}
    assert torch.equal(decode_audio(file, 24_000), whole)
    clip = decode_audio(file, 24_000, 24_000, torch.Generator().manual_seed(0))
    if name != "long24":
        assert torch.equal(clip, wanted[f"train.{name}.wav"])
        return
    starts = [s for s in range(6001) if torch.equal(clip, whole[:, s : s + 24_000])]
    assert len(starts) == 1
    assert torch.equal(decode_audio(file, 24_000, 24_000), whole[:, 3000:27_000])


FORMATS = [
    ("WAV", "PCM_16"),
    ("WAV", "PCM_24"),
    ("WAV", "FLOAT"),
    ("WAV", "PCM_U8"),
    ("FLAC", None),
]
FORMATS += [("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", None)]


@pytest.mark.parametrize(("kind", "subtype"), FORMATS)
@pytest.mark.parametrize("rate", [16_000, 24_000])
def test_a_crop_is_a_piece_of_the_whole_in_every_format(kind, subtype, rate):
    file = cell(noise(rate * 2), rate=rate, kind=kind, subtype=subtype)
    whole = decode_audio(file, 24_000)
    assert abs(whole.shape[1] - 48_000) <= 1
    for seed in range(5):
        crop = decode_audio(file, 24_000, 9_000, torch.Generator().manual_seed(seed))[0]
        # Found by correlation, then compared sample by sample.
        spectrum = torch.fft.rfft(whole[0], 2**16) * torch.fft.rfft(crop, 2**16).conj()
        start = int(torch.fft.irfft(spectrum).argmax())
        torch.testing.assert_close(crop, whole[0, start : start + 9_000], rtol=0, atol=2e-6)


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000])
def test_resampling_keeps_a_tone(rate):
    def tone(rate):
        return np.sin(2 * np.pi * 1000 * np.arange(rate * 2) / rate).astype(np.float32) / 2

    file = cell(tone(rate), rate=rate, subtype="FLOAT")
    wanted = torch.from_numpy(tone(24_000))
    whole = decode_audio(file, 24_000)[0]
    assert whole.shape == wanted.shape
    inner = slice(1200, -1200)  # the tone starts and ends abruptly
    torch.testing.assert_close(whole[inner], wanted[inner], rtol=0, atol=1e-4)
    middle = decode_audio(file, 24_000, 24_000)[0]
    torch.testing.assert_close(middle, wanted[12_000:36_000], rtol=0, atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    rate=st.sampled_from([7_350, 8_000, 11_025, 16_000, 24_000, 44_100, 48_000, 44_101]),
    frames=st.integers(1, 12_000),
    clip=st.integers(1, 6_000),
    seed=st.integers(0, 3),
)
def test_any_length_becomes_a_clip(rate, frames, clip, seed):
    file = cell(noise(frames), rate=rate, subtype="FLOAT")
    wave = decode_audio(file, 24_000, clip, torch.Generator().manual_seed(seed))
    assert wave.shape == (1, clip) and wave.dtype == torch.float32 and wave.isfinite().all()


def test_channels_are_averaged_and_short_recordings_repeated():
    stereo = noise(150, channels=2)
    wave = decode_audio(cell(stereo, subtype="FLOAT"), RATE, 400)[0]
    mono = torch.from_numpy(stereo.mean(axis=1))
    torch.testing.assert_close(wave, torch.cat([mono, mono, mono[:100]]))


def test_every_start_can_be_drawn():
    file = cell(np.arange(12, dtype=np.float32), subtype="FLOAT")
    draws = [decode_audio(file, RATE, 10, torch.Generator().manual_seed(s)) for s in range(40)]
    assert {int(wave[0, 0]) for wave in draws} == {0, 1, 2}


def test_only_the_crop_of_a_long_recording_is_read(tmp_path, monkeypatch):
    (tmp_path / "hour.wav").write_bytes(encoded(np.zeros(3600 * RATE // 10, np.float32)))
    asked, read = [], soundfile.SoundFile.read
    monkeypatch.setattr(
        soundfile.SoundFile,
        "read",
        lambda self, frames, **options: asked.append(frames) or read(self, frames, **options),
    )
    file = {"bytes": None, "path": str(tmp_path / "hour.wav")}
    for rate in (RATE, 24_000):
        decode_audio(file, rate, rate // 2, torch.Generator().manual_seed(0))
    assert max(asked) <= RATE


@pytest.mark.parametrize("name", list(broken_recordings()))
def test_broken_recordings_are_named(name, tmp_path):
    content, reason = broken_recordings()[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UnreadableSample, match=f"{name}: .*{reason}"):
        decode_audio({"bytes": None, "path": str(tmp_path / name)}, RATE)
    with pytest.raises(UnreadableSample, match="row 7: ."):
        decode_audio({"bytes": content, "path": None}, RATE, name="row 7")


@pytest.mark.parametrize("value", [None, {}, {"bytes": None, "path": None}, 3])
def test_cells_without_a_recording_are_named(value):
    with pytest.raises(UnreadableSample, match="row 7: no bytes and no path"):
        decode_audio(value, RATE, name="row 7")


def test_a_wav_that_was_cut_is_named():
    whole = encoded(noise(8000), subtype="FLOAT")
    with pytest.raises(UnreadableSample, match="row 7: it was cut: it ends 16,0.. bytes before"):
        decode_audio({"bytes": whole[: len(whole) // 2]}, RATE, name="row 7")
