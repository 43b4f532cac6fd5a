"""At which size an evaluation takes images, and what it says of whose figures these are."""

import json
import logging
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from hub_cards.evaluation import read_evaluations
from modeling_simvq import SimVQImageConfig, SimVQImageModel, SimVQImageProcessor
from tests.training.support import tiny_peers
from tests.training.support.recordings import encoded, noise
from training import analyze_codebook, tokenize_dataset
from training.data.model_images import EvaluatedImages, at_trained_resolution
from training.evaluation import audio as evaluate_audio
from training.evaluation import image as evaluate_image
from training.evaluation.audio import EvaluatedAudio
from training.evaluation.evaluated_data import evaluated_on, measured_on
from training.evaluation.generated_pictures import first_side
from training.runtime.settings import SettingsError

SIDE = 48


def save_model(folder: Path) -> Path:
    """A tokenizer trained at 48 x 48 pixels."""
    torch.manual_seed(0)
    options = {"hidden_size": 8, "channel_multipliers": [1, 1], "num_res_blocks": 1}
    options |= {"norm_groups": 4}
    config = SimVQImageConfig(codebook_size=16, codebook_dim=8, **options)
    SimVQImageModel(config).save_pretrained(folder)
    size = {"shortest_edge": SIDE}, {"height": SIDE, "width": SIDE}
    SimVQImageProcessor(size=size[0], crop_size=size[1], size_divisor=2).save_pretrained(folder)
    return folder


def save_images(folder: Path, count: int = 3, side: int = 60) -> Path:
    folder.mkdir(parents=True)
    for index in range(count):
        pixels = np.random.default_rng(index).integers(0, 256, (side, side + 8, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("run") / "model")


@pytest.fixture
def accelerator(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return Accelerator()


def evaluated(model, images, accelerator, output: Path, name=None, **data) -> dict:
    settings = evaluate_image.ImageEvaluationSettings(
        model=str(model), fid=False, lpips=[], output=str(output), data_name=name, batch_size=2
    )
    config = EvaluatedImages(dataset=str(images), num_workers=0, **data)
    evaluate_image.run(settings, config, accelerator)
    return json.loads((output / "evaluation.json").read_text())


@pytest.mark.slow
def test_an_evaluation_has_the_size_of_the_training(model, tmp_path, accelerator, caplog):
    images = save_images(tmp_path / "held_out")
    report = evaluated(model, images, accelerator, tmp_path / "a")
    assert (
        report["evaluated_at"] == report["trained_at"] == report["settings"]["resolution"] == SIDE
    )
    assert (
        "Short side to 48 pixels" in report["protocol"] and "trained at" not in report["protocol"]
    )
    with caplog.at_level(logging.WARNING):
        other = evaluated(model, images, accelerator, tmp_path / "b", resolution=32)
    said = "Images of 32 x 32 pixels; the model was trained at 48 x 48."
    assert said in caplog.text and said in other["protocol"]
    assert other["evaluated_at"] == 32 and other["trained_at"] == SIDE
    assert other["metrics"]["bits_per_pixel"] == 1  # 16 codes for 2 x 2 pixels
    assert other["fingerprint"] != report["fingerprint"]
    assert said in (tmp_path / "b" / "evaluation.md").read_text()


@pytest.mark.slow
def test_a_held_out_folder_is_called_by_its_name(model, tmp_path, accelerator):
    images = save_images(tmp_path / "held_out")
    report = evaluated(model, images, accelerator, tmp_path / "a")
    assert report["dataset"] == {"name": "held_out", "samples": 3}
    assert (
        "Measured on 3 images of the local files 'held_out', which have no splits; "
        in report["protocol"]
    )
    assert "what the model was trained on is not recorded beside it." in report["protocol"]
    named = evaluated(model, images, accelerator, tmp_path / "b", name="Our shelf")
    assert named["dataset"]["name"] == "Our shelf"
    assert named["protocol"].startswith(
        "Measured on 3 images of Our shelf: the local files 'held_out'"
    )
    (evaluation,) = read_evaluations(tmp_path / "b" / "evaluation.json")
    assert (
        evaluation.split is None
        and str(tmp_path) not in (tmp_path / "b" / "evaluation.json").read_text()
    )


@pytest.mark.parametrize(
    ("trained", "part", "words"),
    [
        ("ILSVRC/imagenet-1k", "train", "the model was trained on ILSVRC/imagenet-1k (train)"),
        ("{here}/other", "train", "the model was trained on other local files"),
        ("(local files)", "train", "the model was trained on local files"),
        (
            "{here}/held_out",
            "train[:90%]",
            "the model was trained on split train[:90%] of the same",
        ),
        ("{here}/held_out", "train", "the model was trained on the same"),
    ],
)
def test_what_the_model_was_trained_on_is_said(trained, part, words, tmp_path, caplog):
    for name in ("held_out", "other"):
        save_images(tmp_path / name, 1)
    (tmp_path / "run" / "model").mkdir(parents=True)
    content = {"dataset": trained.format(here=tmp_path), "train_split": part}
    (tmp_path / "run" / "settings.json").write_text(json.dumps(content))
    data = EvaluatedImages(dataset=str(tmp_path / "held_out"))
    with caplog.at_level(logging.WARNING):
        text = measured_on(evaluated_on(data), data, 1, "image", str(tmp_path / "run" / "model"))
    assert (
        text == f"Measured on 1 image of the local files 'held_out', which have no splits; {words}."
    )
    assert ("trained on what it is measured on" in caplog.text) == (words.endswith("on the same"))


def test_splits_keep_their_names(tmp_path):
    for folder in ("photos/validation", "photos/train", "classes/cat", "classes/dog"):
        save_images(tmp_path / folder, 1)
    photos, classes = (EvaluatedImages(dataset=str(tmp_path / n)) for n in ("photos", "classes"))

    def found(data, *options):
        on = evaluated_on(data, *options)
        return on.split, on.name, on.named_split

    assert found(photos) == ("validation", "photos, validation", "validation")
    assert found(photos, None, "train") == ("train", "photos, train", "train")
    assert found(classes) == ("train", "classes", None)
    part = EvaluatedImages(dataset=str(tmp_path / "classes"), validation_split="train[:50%]")
    assert found(part)[1:] == ("classes, train[:50%]", "train[:50%]")
    hub = EvaluatedImages(dataset="org/photographs")
    assert found(hub, None, "test") == ("test", "org/photographs, test", "test")
    assert found(hub, "Photographs", "test") == ("test", "Photographs", "test")
    datasets.Dataset.from_dict({"image": [b"x"]}).save_to_disk(str(tmp_path / "saved"))
    assert found(EvaluatedImages(dataset=str(tmp_path / "saved"))) == ("train", "saved", None)
    off = EvaluatedImages(dataset=str(tmp_path / "classes"), validation_split=None)
    assert found(off)[0] is None
    speech = EvaluatedAudio(dataset=str(tmp_path / "voices"))
    (tmp_path / "voices").mkdir()
    (tmp_path / "voices" / "a.wav").write_bytes(encoded(noise(100)))
    assert found(speech) == ("train", "voices", None)


def test_without_a_processor_the_size_must_be_given(tmp_path):
    with pytest.raises(SettingsError, match="resolution: .* holds no image processor: set it"):
        at_trained_resolution(EvaluatedImages(dataset="x"), str(tmp_path))
    data = EvaluatedImages(dataset="x", resolution=32)
    assert at_trained_resolution(data, str(tmp_path)) is None and data.resolution == 32
    with pytest.raises(SettingsError, match="resolution must be at least 1"):
        EvaluatedImages(dataset="x", resolution=0)


@pytest.mark.slow
def test_codes_and_the_analysis_have_the_size_of_the_training(model, tmp_path, accelerator):
    images = save_images(tmp_path / "shelf")
    settings = tokenize_dataset.TokenizeSettings(
        model=str(model), output=str(tmp_path / "codes"), splits=["train"]
    )
    tokenize_dataset.run(settings, EvaluatedImages(dataset=str(images), num_workers=0), accelerator)
    plan = json.loads((tmp_path / "codes" / "tokenization.json").read_text())
    assert plan["resolution"] == SIDE
    settings = analyze_codebook.AnalysisSettings(model=str(model), output=str(tmp_path / "page"))
    for options, said in (
        ({}, "shelf, model at 48 x 48 pixels."),
        ({"resolution": 32}, "shelf, model at 32 x 32 pixels (trained at 48 x 48)."),
    ):
        data = analyze_codebook.AnalysedImages(dataset=str(images), num_workers=0, **options)
        analyze_codebook.run(settings, data, accelerator)
        assert (
            said.replace("model", model.parent.name)
            in (tmp_path / "page" / "codebook.md").read_text()
        )


def test_made_images_tell_their_size(tmp_path):
    images = save_images(tmp_path / "made", side=56)
    (images / "0.png").write_bytes(b"no image")
    assert first_side(EvaluatedImages(dataset="x"), str(images), "train") == 56


@pytest.mark.slow
def test_tokenizers_of_other_libraries_by_the_same_protocol(tmp_path, accelerator):
    images = save_images(tmp_path / "held_out")
    vq = tiny_peers.save(tiny_peers.vq_model(), tmp_path / "vq")
    report = evaluated(vq, images, accelerator, tmp_path / "a", resolution=32)
    assert (
        report["metrics"]["bits_per_pixel"] == 5 / 4 and 0 < report["metrics"]["utilisation"] <= 1
    )
    kl = tiny_peers.save(tiny_peers.autoencoder_kl(), tmp_path / "kl")
    continuous = evaluated(kl, images, accelerator, tmp_path / "b", resolution=32)
    assert continuous["fingerprint"] == report["fingerprint"]  # the same samples
    assert "no discrete code" in continuous["protocol"]
    assert not {"bits_per_pixel", "utilisation", "perplexity"} & set(continuous["metrics"])
    with pytest.raises(SettingsError, match="takes multiples of 2 pixels, got 33: set 32"):
        evaluated(kl, images, accelerator, tmp_path / "c", resolution=33)
    with pytest.raises(SettingsError, match="resolution: .* set it in pixels"):
        evaluated(kl, images, accelerator, tmp_path / "c")


@pytest.mark.slow
def test_an_audio_tokenizer_of_another_library(tmp_path, accelerator):
    (tmp_path / "speech").mkdir()
    (tmp_path / "speech" / "a.flac").write_bytes(encoded(noise(16_000), 16_000, "FLAC"))
    model = tiny_peers.save(tiny_peers.dac(), tmp_path / "dac")
    settings = evaluate_audio.AudioEvaluationSettings(
        model=model, metrics=["stoi"], num_quantizers=2, output=str(tmp_path / "found")
    )
    data = EvaluatedAudio(dataset=str(tmp_path / "speech"), num_workers=0)
    evaluate_audio.run(settings, data, accelerator)
    report = json.loads((tmp_path / "found" / "evaluation.json").read_text())
    assert report["metrics"]["bitrate"] == pytest.approx(2 * 16_000 / 8 * 5 / 1000)
    assert {"utilisation_1", "utilisation_2"} <= set(report["metrics"])
    assert "With the first 2 of 3 quantizers." in report["protocol"]
    assert "Whole recordings at 16,000 Hz" in report["protocol"]
