"""The Space's microphone: pieces of speech in any order, and visitors in a browser who speak at once."""

import base64
import io
import json
import math
import re
import shutil
import wave
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from modeling_simvq import SimVQAudioConfig, SimVQAudioFeatureExtractor, SimVQAudioModel
from tests.hub_cards.artefacts import artefacts
from tests.hub_cards.space_page import chromium, running_space

soxr = pytest.importorskip("soxr", reason="the Space needs soxr")
from hub_cards.space import microphone  # noqa: E402

RATE, HOP = 24_000, 320
SMALL = {"num_filters": 4, "codebook_size": 64, "codebook_dim": 16, "hidden_size": 32}
SMALL |= {"intermediate_size": 64, "num_decoder_layers": 2, "attention_window": 20}


@pytest.fixture(scope="module")
def streaming(tmp_path_factory) -> Path:
    """A streaming tokenizer of random weights, with its code."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("microphone") / "streaming"
    SimVQAudioModel(SimVQAudioConfig(**SMALL, streaming=True)).save_pretrained(folder)
    SimVQAudioFeatureExtractor().save_pretrained(folder)
    return folder


def speech(seconds: float, rate: int) -> np.ndarray:
    """A voice of rising pitch, (L,) int16."""
    time = np.arange(round(seconds * rate)) / rate
    wave = np.sin(2 * np.pi * (120 + 40 * time) * time) * (1.2 + np.sin(9 * time))
    return (wave * 10_000).astype(np.int16)


def piece(number: int, samples: np.ndarray, rate: int, last: bool = False) -> str:
    """A piece as microphone.js sends it."""
    text = base64.b64encode(samples.astype("<i2").tobytes()).decode()
    return json.dumps({"number": number, "rate": rate, "last": last, "samples": text})


def spoken(samples: np.ndarray, rate: int, cuts: list[int]) -> list[str]:
    parts = np.split(samples, cuts)
    return [piece(i, part, rate, i == len(cuts)) for i, part in enumerate(parts)]


def answered(model, pieces: list[str]) -> tuple[np.ndarray, list[str]]:
    """Decoded samples (L,) int16 and the lines."""
    recording = microphone.Recording()
    for text in pieces:
        recording.add(text)
    sounds, lines = zip(*microphone.answers(model, recording), strict=True)
    found = []
    for sound in filter(None, sounds):
        with wave.open(io.BytesIO(sound)) as file:
            assert file.getframerate() == RATE
            found.append(np.frombuffer(file.readframes(file.getnframes()), np.int16))
    return np.concatenate(found), list(lines)


def test_pieces_that_overtake_each_other_are_put_in_order():
    recording, samples = microphone.Recording(), np.arange(10, dtype=np.int16)
    pieces = spoken(samples, RATE, [3, 3, 7])
    for number in (2, 0, 3, 1):
        recording.add(pieces[number])
    found = [part for part, _ in recording]
    np.testing.assert_array_equal(np.concatenate(found) * 32768, samples)
    assert [len(part) for part in found] == [3, 4, 3]  # no empty one


def test_a_recording_that_breaks_off_ends_after_a_while(monkeypatch):
    monkeypatch.setattr(microphone, "PATIENCE_SECONDS", 0.01)
    recording = microphone.Recording()
    recording.add(piece(0, np.ones(5), RATE))
    recording.add(piece(2, np.ones(5), RATE))
    assert len(list(recording)) == 1


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "no sound"),
        ("[]", "no sound"),
        ('{"number": 0, "rate": 24000, "last": false, "samples": "!"}', "no sound"),
        ('{"number": 0, "rate": 24000, "last": false, "samples": "AAAA"}', "no sound"),  # 3 bytes
        ('{"number": null, "rate": 24000, "last": false, "samples": ""}', "no sound"),
        (piece(0, np.ones(2), 1), "2 samples at 1 Hz"),
        (piece(0, np.ones(8000 * 61), 8000), "488,000 samples at 8,000 Hz at once"),
    ],
)
def test_what_is_no_piece(text, told):
    with pytest.raises(ValueError, match=told):
        microphone.Recording().add(text)


@pytest.mark.parametrize("rate", [16_000, 44_100, 48_000])
def test_pieces_are_resampled_without_seams(rate):
    samples = speech(1.5, rate) / np.float32(32768)
    generator = np.random.default_rng(0)
    cuts = np.sort(generator.integers(0, len(samples), 12))
    resampler = microphone.Resampler(RATE)
    parts = [resampler.next(part, rate) for part in np.split(samples, cuts)]
    found = np.concatenate([*parts, resampler.rest()])
    np.testing.assert_allclose(found, soxr.resample(samples, rate, RATE), atol=1e-6)


@pytest.mark.parametrize("rate", [RATE, 48_000])
def test_answers_are_those_of_the_whole_clip(streaming, monkeypatch, rate):
    monkeypatch.setattr(microphone, "CAN_PLAY", True)
    model = SimVQAudioModel.from_pretrained(streaming).eval()
    samples = speech(1.01, rate)
    found, lines = answered(model, spoken(samples, rate, [5, 7000, 7000, 15_000]))
    resampled = soxr.resample(samples / np.float32(32768), rate, RATE)
    with torch.no_grad():
        codes = model.encode(torch.from_numpy(resampled)[None, None]).audio_codes
        expected = model.decode(codes).audio_values[0, 0].clamp(-1, 1) * 32767
    np.testing.assert_allclose(found, expected.round().numpy(), atol=1)
    assert lines[-1].startswith(f"**{codes.numel()} codes** in 1.0 s, 450 bit/s; latency 33 ms")


def test_a_recording_ends_at_the_longest_time(streaming, monkeypatch):
    monkeypatch.setattr(microphone, "LONGEST_SECONDS", 1)
    model = SimVQAudioModel.from_pretrained(streaming).eval()
    recording = microphone.Recording()
    for number in range(5):
        recording.add(piece(number, speech(0.6, RATE), RATE))
    assert len(list(microphone.answers(model, recording))) == 3  # two pieces and the rest


def test_without_ffmpeg_codes_are_counted_and_nothing_plays(streaming, monkeypatch):
    monkeypatch.setattr(microphone, "CAN_PLAY", False)
    model, recording = SimVQAudioModel.from_pretrained(streaming).eval(), microphone.Recording()
    recording.add(piece(0, speech(0.2, RATE), RATE, last=True))
    sounds, lines = zip(*microphone.answers(model, recording), strict=True)
    assert set(sounds) == {None} and lines[-1].startswith("**15 codes**")


def test_weights_that_are_not_finite(streaming):
    model, recording = SimVQAudioModel.from_pretrained(streaming).eval(), microphone.Recording()
    torch.nn.init.constant_(model.decoder.head.bias, math.nan)
    recording.add(piece(0, speech(0.2, RATE), RATE))
    with pytest.raises(ValueError, match="not finite"):
        list(microphone.answers(model, recording))


@pytest.mark.soak
def test_a_visitor_who_denies_the_microphone_is_told(streaming, tmp_path):
    with chromium() as browser, running_space([str(streaming)], tmp_path) as address:
        page = browser.new_page()
        page.goto(address)
        page.get_by_role("tab", name="Microphone").click(timeout=20_000)
        page.get_by_role("button", name="Start speaking").click()
        toast = page.get_by_test_id("toast-body").filter(has_text="microphone cannot be used")
        toast.wait_for(timeout=20_000)
        assert page.get_by_role("button", name="Start speaking").is_enabled()


@pytest.mark.soak
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="there is no ffmpeg")
def test_two_visitors_speak_at_once(streaming, checkpoints, tmp_path):
    """The tab comes with a streaming tokenizer; the second visitor's codes are not counted to the first's."""
    soundfile.write(tmp_path / "speech.wav", speech(30, 48_000), 48_000)
    arguments = [
        "--use-fake-ui-for-media-stream",
        "--use-fake-device-for-media-stream",
        f"--use-file-for-fake-audio-capture={tmp_path / 'speech.wav'}%noloop",
    ]
    listed = [str(checkpoints["sounds"]), str(streaming)]
    with chromium(*arguments) as browser, running_space(listed, tmp_path) as address:
        from playwright.sync_api import expect

        expect.set_options(timeout=20_000)
        pages, failed = [browser.new_context().new_page() for _ in range(2)], []
        for page in pages:
            page.on("pageerror", lambda error: failed.append(error))
            page.goto(address)
            expect(page.locator("#about")).to_contain_text("320 samples at 24,000 Hz")
            expect(page.get_by_role("tab", name="Microphone")).to_have_count(0)
            page.get_by_label("Checkpoint").click()
            page.get_by_role("option", name=str(streaming)).click()
            page.get_by_role("tab", name="Microphone").click()
            expect(page.get_by_role("button", name="Stop")).to_be_disabled()
        first, second = pages

        def counted(page) -> tuple[int, float]:
            line = page.locator("#microphone_line").inner_text()
            codes, seconds = re.match(r"([\d,]+) codes in ([\d.]+) s, 450 bit/s", line).groups()
            return int(codes.replace(",", "")), float(seconds)

        def position(page) -> tuple[float, float]:
            shown = page.locator("#heard audio").first
            return tuple(shown.evaluate("sound => [sound.currentTime, sound.duration]"))

        first.get_by_role("button", name="Start speaking").click()
        expect(first.locator("#microphone_line")).to_contain_text(re.compile(r"in ([3-9]|\d\d)\."))
        second.get_by_role("button", name="Start speaking").click()
        expect(second.locator("#microphone_line")).to_contain_text(re.compile(r"in ([1-9]|\d\d)\."))
        playing = position(first)[0]
        assert playing > 0.3  # while the first still speaks
        first.screenshot(path=artefacts() / "space_microphone.png", full_page=True)
        for page in (second, first):  # so that the first speaks longer, however slow all this is
            page.get_by_role("button", name="Stop").click()
            expect(page.get_by_role("button", name="Start speaking")).to_be_enabled()
        for page in pages:
            codes, seconds = counted(page)
            assert abs(codes - seconds * RATE / HOP) < 8
            # All of it plays, to its end.
            page.wait_for_function("document.querySelector('#heard audio').ended", timeout=20_000)
            assert position(page)[1] == pytest.approx(codes * HOP / RATE, abs=0.2)
        assert counted(second)[1] < counted(first)[1]
        # Once more: counted from the start, and the tab goes with its tokenizer.
        second.get_by_role("button", name="Start speaking").click()
        expect(second.locator("#microphone_line")).to_contain_text(re.compile(r"codes in [0-4]\."))
        second.get_by_role("button", name="Stop").click()
        expect(second.get_by_role("button", name="Start speaking")).to_be_enabled()
        second.get_by_label("Checkpoint").click()
        second.get_by_role("option", name=listed[0]).click()
        expect(second.get_by_role("tab", name="Microphone")).to_have_count(0)
        expect(second.get_by_role("button", name="Encode and reconstruct")).to_be_visible()
        assert not failed
