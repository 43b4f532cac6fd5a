"""The audio feature extractor: every form of input, ragged batches, masks, and errors that name the clip."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_simvq.feature_extraction_simvq import SimVQAudioFeatureExtractor

ROOT = Path(__file__).parents[2]
RATE = {"sampling_rate": 24_000}


def clip(samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, samples).astype(np.float32)


def extract(audio, **options):
    return SimVQAudioFeatureExtractor()(audio, **{"return_tensors": "pt"} | RATE | options)


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 2000), min_size=1, max_size=6))
def test_ragged_clips_come_back_whole(lengths):
    clips = [clip(length, seed) for seed, length in enumerate(lengths)]
    batch = extract(clips)
    longest = max(lengths)  # not a multiple of the hop: the model pads each clip itself
    assert set(batch) == {"input_values", "padding_mask"}
    assert batch.input_values.shape == (len(clips), 1, longest)
    assert batch.input_values.dtype == torch.float32
    assert batch.padding_mask.shape == (len(clips), longest)
    assert batch.padding_mask.dtype == torch.int64
    for wave, values, mask in zip(clips, batch.input_values, batch.padding_mask, strict=True):
        assert np.array_equal(values[0, : len(wave)].numpy(), wave)
        assert not values[0, len(wave) :].any()
        assert mask.tolist() == [1] * len(wave) + [0] * (longest - len(wave))


FORMS = {
    "numpy": lambda wave: wave,
    "float64": lambda wave: wave.astype(np.float64),
    "list": lambda wave: wave.tolist(),
    "tuple": lambda wave: tuple(wave.tolist()),
    "numpy scalars": list,
    "tensor": torch.from_numpy,
    "tensor with gradient": lambda wave: torch.from_numpy(wave).requires_grad_(),
    "reversed view": lambda wave: wave[::-1].copy()[::-1],
}


@pytest.mark.parametrize("form", list(FORMS))
def test_every_form_of_a_clip(form):
    wave = clip(700)
    single = extract(FORMS[form](wave)).input_values
    assert np.array_equal(single.numpy(), wave[None, None])
    batch = extract([FORMS[form](wave), FORMS[form](wave[:9])])
    assert np.array_equal(batch.input_values[0, 0].numpy(), wave)
    assert batch.padding_mask.sum(1).tolist() == [700, 9]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32(dtype):
    wave = torch.from_numpy(clip(50)).to(dtype)
    values = extract(wave).input_values
    assert values.dtype == torch.float32 and torch.equal(values[0, 0], wave.float())


def test_the_input_is_left_alone():
    wave = clip(50)
    extract([wave, clip(80)]).input_values.zero_()
    extract(wave).input_values.zero_()
    assert np.array_equal(wave, clip(50))


def test_padding_and_truncation():
    clips = [clip(500), clip(300)]
    batch = extract(clips, padding="max_length", max_length=800)
    assert batch.input_values.shape == (2, 1, 800)
    assert batch.padding_mask.sum(1).tolist() == [500, 300]
    batch = extract(clips, truncation=True, max_length=400)
    assert batch.input_values.shape == (2, 1, 400)
    assert batch.padding_mask.sum(1).tolist() == [400, 300]
    batch = extract(clips, padding="max_length", truncation=True, max_length=350)
    assert batch.input_values.shape == (2, 1, 350)
    ragged = extract(clips, padding=False, return_tensors=None)
    assert [values.shape for values in ragged["input_values"]] == [(1, 500), (1, 300)]
    assert [mask.shape for mask in ragged["padding_mask"]] == [(500,), (300,)]
    with pytest.raises(ValueError, match="padding=True"):
        extract(clips, padding=False)
    with pytest.raises(ValueError, match="max_length"):
        extract(clips, truncation=True)
    arrays = extract(clips, return_tensors="np")
    assert isinstance(arrays["input_values"], np.ndarray)
    assert arrays["input_values"].dtype == np.float32


def test_another_padding_value():
    batch = SimVQAudioFeatureExtractor(padding_value=0.5)([clip(9), clip(5)], **RATE)
    assert batch["input_values"][1][0, 5:].tolist() == [0.5] * 4


def test_a_wrong_sampling_rate_is_an_error_with_the_fix():
    with pytest.raises(
        ValueError, match=r"16000 Hz.*24000 Hz.*soxr.resample\(clip, 16000, 24000\)"
    ):
        extract(clip(9), sampling_rate=16_000)


def test_a_missing_sampling_rate_is_a_warning_once(caplog):
    extractor = SimVQAudioFeatureExtractor(sampling_rate=12_345)  # so that the text is a new one
    for _ in range(3):
        extractor(clip(9))
    assert (
        sum("12345 Hz: pass sampling_rate" in record.getMessage() for record in caplog.records) == 1
    )


GOOD = clip(20)
NAN, INFINITE = clip(20), clip(20)
NAN[3], INFINITE[3] = np.nan, -np.inf
MISTAKES = {
    "stereo, channels first": (
        [GOOD, clip(40).reshape(2, 20)],
        r"clip 1 .*\(2, 20\).*to_mono=True",
    ),
    "stereo, channels last": ([clip(40).reshape(20, 2)], r"clip 0 .*\(20, 2\).*to_mono=True"),
    "nested lists": ([[[0.1, 0.2], [0.3, 0.4]]], r"clip 0 .*\(2, 2\)"),
    "one array, channels last": (clip(40).reshape(20, 2), r"\(20, 2\).*list\(audio\).*to_mono"),
    "an array without clips": (np.zeros((0, 5)), r"empty array.*\(0, 5\)"),
    "stereo of integers": (np.zeros((2, 5), np.int16), "clip 0 .*int16"),
    "three axes": ([np.zeros((1, 2, 3))], r"clip 0 .*\(1, 2, 3\)"),
    "no axis": ([np.zeros(3), np.float32(0.5)], "clip 1"),
    "int16": ([GOOD, np.zeros(5, np.int16)], r"clip 1 .*int16.*clip / 32768"),
    "int32 tensor": (torch.zeros(5, dtype=torch.int32), r"clip 0 .*int32.*clip / 2147483648"),
    "uint8": (np.zeros(5, np.uint8), r"clip 0 .*uint8.*\(clip - 128.0\) / 128"),
    "list of integers": ([0, 1, 2], "clip 0 .*int64"),
    "bool": (np.zeros(5, bool), "clip 0 .*bool"),
    "complex": (np.zeros(5, complex), "clip 0 .*complex"),
    "NaN": ([GOOD, GOOD, NAN], "clip 2 has NaN"),
    "infinite": (torch.from_numpy(INFINITE), "clip 0 has NaN or infinite"),
    "beyond float32": (np.array([1e300]), "clip 0 has NaN or infinite"),
    "empty": ([GOOD, np.zeros(0, np.float32)], "clip 1 is empty"),
    "empty array": (np.zeros(0), "clip 0 is empty"),
    "empty list in a batch": ([[0.1], []], "clip 1 is empty"),
    "empty batch": ([], "empty list"),
    "ragged list": ([[0.1, [0.2]]], "clip 0 is not a flat list"),
    "words": (["speech.wav"], "clip 0 is a str"),
    "words in a clip": ([["a", "b"]], "clip 0 holds"),
    "nothing": ([GOOD, None], "clip 1 is a NoneType"),
    "row of a dataset": ({"array": GOOD, "sampling_rate": 24_000}, 'dict.*row\\["audio"\\]'),
    "a path": ("speech.wav", "str"),
}


@pytest.mark.parametrize("mistake", list(MISTAKES))
def test_mistakes_are_named(mistake):
    audio, words = MISTAKES[mistake]
    with pytest.raises(ValueError, match=words):
        extract(audio)


@pytest.mark.parametrize(
    "options",
    [{"feature_size": 2}, {"sampling_rate": 0}, {"hop_length": 0}, {"padding_side": "left"}],
    ids=lambda options: next(iter(options)),
)
def test_impossible_settings_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        SimVQAudioFeatureExtractor(**options)


def test_saving_and_loading(tmp_path):
    extractor = SimVQAudioFeatureExtractor(sampling_rate=16_000, hop_length=200, padding_value=0.25)
    extractor.save_pretrained(tmp_path)
    loaded = SimVQAudioFeatureExtractor.from_pretrained(tmp_path)
    assert loaded.to_dict() == extractor.to_dict()
    assert (loaded.sampling_rate, loaded.hop_length, loaded.padding_value) == (16_000, 200, 0.25)
    clips = [clip(30), clip(50)]
    ours, theirs = (
        e(clips, sampling_rate=16_000, return_tensors="pt") for e in (extractor, loaded)
    )
    assert torch.equal(ours.input_values, theirs.input_values)
    assert torch.equal(ours.padding_mask, theirs.padding_mask)


@pytest.mark.slow
def test_the_file_alone_is_enough_and_needs_no_torchvision():
    code = (
        "import runpy, sys; runpy.run_path('modeling_simvq/feature_extraction_simvq.py'); "
        "print('torchvision' in sys.modules, 'modeling_simvq' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["False", "False"]


def test_the_model_takes_what_comes_out(tiny_audio_model):
    inputs = extract([clip(7001), clip(450)])
    encoded = tiny_audio_model.encode(**inputs)
    assert encoded.audio_codes.shape == (2, 1, 22)  # ceil(7001 / 320)
    assert encoded.audio_codes_mask.sum(-1).flatten().tolist() == [22, 2]


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_arrays_of_two_and_three_axes_are_clips_of_one_length(kind):
    clips = clip(60).reshape(3, 20)
    expected = extract(list(clips))["input_values"]
    assert torch.equal(extract(kind(clips))["input_values"], expected)
    assert torch.equal(extract(kind(clips[:, None]))["input_values"], expected)
    assert torch.equal(extract(kind(clips[:1]))["input_values"], expected[:1])


@pytest.mark.parametrize("shape", [(2, 20), (20, 2)])
def test_channels_are_mixed_down_on_request(shape):
    stereo = clip(40).reshape(shape)
    mean = stereo.mean(axis=shape.index(2)).astype(np.float32)
    for clips in (stereo, [stereo], torch.from_numpy(stereo)):
        found = extract(clips, to_mono=True)["input_values"]
        assert torch.equal(found, torch.from_numpy(mean)[None, None])
    both = extract([GOOD, stereo], to_mono=True)["input_values"]
    assert torch.equal(both[0, 0], torch.from_numpy(GOOD).float())


def test_lengths_are_padded_to_a_multiple():
    inputs = extract([clip(20), clip(50)], pad_to_multiple_of=32)
    assert inputs["input_values"].shape == (2, 1, 64)
    assert inputs["padding_mask"].sum(dim=1).tolist() == [20, 50]


def test_clips_go_by_either_name():
    extractor = SimVQAudioFeatureExtractor()
    found = extractor(audio=GOOD, return_tensors="pt", **RATE)["input_values"]
    assert torch.equal(found, extract(GOOD)["input_values"])
    for clips in ({"raw_audio": GOOD, "audio": GOOD}, {}):
        with pytest.raises(ValueError, match="one of them"):
            extractor(**clips)
