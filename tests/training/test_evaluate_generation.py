"""The evaluator of generated pictures: known values, pictures of a pipeline, the real command on two ranks."""

import dataclasses
import json
import math
from functools import partial
from pathlib import Path

import pytest
import skimage.data
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.image.fid import FrechetInceptionDistance

from tests.support.programs import TWO_RANKS, launch
from training.data.images import ImageDataConfig
from training.evaluation import generation, generation_figures
from training.evaluation.generated_pictures import Generated, from_pipeline
from training.evaluation.generation import GenerationEvaluationSettings, run
from training.evaluation.generation_figures import RealPictures, evaluate
from training.metrics.images import to_bytes
from training.metrics.inception import (
    frechet_distance,
    inception_score,
    load_inception,
)
from training.metrics.neighbours import NearestPictures, pixel_vectors, share_nearer
from training.runtime.errors import MissingWeights
from training.runtime.settings import SettingsError

REPOSITORY = Path(__file__).parents[2]


class Features(nn.Module):
    """Twelve features without Inception's 87 MB: block means."""

    def forward(self, pictures):
        return nn.functional.adaptive_avg_pool2d(pictures.float(), 2).flatten(1)


@pytest.fixture
def few_features(monkeypatch):
    monkeypatch.setattr(generation_figures, "frechet_distance", partial(frechet_distance, width=12))


class Pictures(torch.utils.data.Dataset):
    def __init__(self, count: int, seed: int):
        coarse = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        self.pixels = nn.functional.interpolate(coarse, size=32, mode="bilinear")

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        return {
            "pixel_values": self.pixels[index],
            "valid": torch.tensor(True),
            "unreadable": torch.tensor(0),
        }


def generated(count: int, seed: int) -> Generated:
    def pixels(batch):
        return batch["pixel_values"], torch.arange(len(batch["valid"])) % 2

    return Generated(DataLoader(Pictures(count, seed), 5), pixels, ["tabby", "dog"])


@pytest.fixture
def accelerator(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return Accelerator()


@pytest.mark.slow
def test_copies_of_the_training_pictures_are_found_out(accelerator, few_features, tmp_path):
    train, held_out = DataLoader(Pictures(12, 0), 4), DataLoader(Pictures(9, 1), 4)
    real = RealPictures(train, held_out, "train")
    found = evaluate(
        generated(12, 0), real, accelerator, Features(), neighbours=12, folder=tmp_path
    )
    metrics = found.metrics
    assert found.samples == 12 and "rfid" not in metrics and "inception_score" not in metrics
    assert abs(metrics["gfid"]) < 1e-3  # of features whose variances are in the thousands
    assert metrics["nearest_feature"] == 0 and metrics["nearest_pixel"] == 0
    assert metrics["nearer_feature"] == 1 and metrics["nearer_pixel"] == 1
    assert metrics["nearest_pixel_held_out"] > 10
    for name in ("samples.png", "neighbours.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 100


def test_figures_are_those_of_the_packages_called_directly(accelerator, few_features):
    train, held_out = Pictures(20, 0), Pictures(11, 1)
    real = RealPictures(DataLoader(train, 4), DataLoader(held_out, 4), "validation")
    made = generated(13, 2)

    class Classifier(nn.Module):  # sure of one of two classes, by turns
        def forward(self, pictures):
            return torch.eye(2).repeat(len(pictures), 1)[: len(pictures)] * 100

    metrics = evaluate(
        made, real, accelerator, Features(), classifier=Classifier(), neighbours=6
    ).metrics
    features = Features()
    features.num_features = 12
    direct = FrechetInceptionDistance(feature=features)
    direct.update(to_bytes(held_out.pixels), real=True)
    direct.update(to_bytes(made.loader.dataset.pixels), real=False)
    assert metrics["gfid"] == pytest.approx(float(direct.compute()), rel=1e-3)
    samples = pixel_vectors(to_bytes(made.loader.dataset.pixels))[:6].double()
    expected = torch.cdist(samples, pixel_vectors(to_bytes(train.pixels)).double()).amin(1)
    expected = float(expected.median()) / math.sqrt(3 * 32 * 32)
    assert metrics["nearest_pixel"] == pytest.approx(expected, rel=1e-9)
    assert 0 <= metrics["nearer_pixel"] <= 1


def test_the_inception_score_of_cases_known_by_hand():
    assert inception_score(torch.eye(4).repeat(1000, 1) * 500) == pytest.approx(4, rel=0.05)
    assert inception_score(torch.randn(1, 4).repeat(50, 1)) == pytest.approx(1)


def test_nearest_over_batches():
    train = torch.tensor([[0.0, 0.0], [3.0, 4.0], [10.0, 0.0]])
    pictures = torch.arange(3, dtype=torch.uint8)[:, None, None, None].expand(3, 3, 2, 2)
    search = NearestPictures(torch.tensor([[3.0, 4.0], [9.0, 0.0], [0.0, 1.0]]), 2.0, kept=2)
    assert search.distances.isinf().all()
    for index in range(3):
        search.add(train[index : index + 1], pictures[index : index + 1])
    assert search.distances.tolist() == [0, 2, 2]
    assert search.pictures[:, 0, 0, 0].tolist() == [1, 2]
    held_out = torch.linspace(1, 2, 101, dtype=torch.float64)
    assert share_nearer(held_out, held_out) == pytest.approx(0.05, abs=0.01)


def test_too_few_pictures(accelerator, few_features):
    real = RealPictures(DataLoader(Pictures(3, 0), 4), None, "train")
    with pytest.raises(ValueError, match="two generated images, 1 can"):
        evaluate(generated(1, 0), real, accelerator, Features())
    with pytest.raises(SettingsError, match="name a generator, or images"):
        GenerationEvaluationSettings()
    with pytest.raises(SettingsError, match="output"):
        GenerationEvaluationSettings(pictures="folder")


def write_pipeline(folder: Path) -> None:
    from modeling_simvq import (
        SimVQForImageGeneration,
        SimVQImageConfig,
        SimVQImageGenerationConfig,
        SimVQImageModel,
        SimVQImagePipeline,
        SimVQImageProcessor,
    )

    torch.manual_seed(0)
    small = {"base_channels": 32, "channel_multipliers": [1, 2], "num_res_blocks": 1}
    tokenizer = SimVQImageModel(SimVQImageConfig(**small, codebook_size=64, codebook_dim=16))
    config = SimVQImageGenerationConfig(
        codebook_size=64,
        num_classes=3,
        grid_size=(8, 8),
        id2label={0: "tabby", 1: "dog", 2: "bus"},
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    pipe = SimVQImagePipeline(
        tokenizer.eval(),
        SimVQForImageGeneration(config).eval(),
        SimVQImageProcessor(size_divisor=2),
    )
    pipe.save_pretrained(folder)


@pytest.mark.slow
def test_a_pipeline_is_sampled_alike_on_any_number_of_ranks(
    accelerator, few_features, tmp_path, monkeypatch
):
    from modeling_simvq import SimVQImagePipeline

    write_pipeline(tmp_path / "generator")
    pipe = SimVQImagePipeline.from_pretrained(tmp_path / "generator")
    pipe.set_progress_bar_config(disable=True)
    found = []
    for ranks in (1, 2):
        made = from_pipeline(
            pipe, 7, resolution=16, batch_size=4, ranks=ranks, seed=3, temperature=0.9
        )
        assert len(made.loader) % ranks == 0 and made.names == ["tabby", "dog", "bus"]
        batches = [(made.pixels(batch), batch["valid"]) for batch in made.loader]
        found.append([torch.cat([part[i][valid] for part, valid in batches]) for i in range(2)])
    (pixels, labels), (again, _) = found
    assert torch.equal(pixels, again) and labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert pixels.shape == (7, 3, 16, 16) and len(torch.unique(pixels, dim=0)) == 7
    wrong = from_pipeline(pipe, 7, resolution=32, batch_size=4, ranks=1, seed=3)
    with pytest.raises(SettingsError, match="set resolution=16"):
        wrong.pixels(next(iter(wrong.loader)))
    # The command's own path, with stand-ins for the networks.
    write_photos(tmp_path / "photos")
    monkeypatch.setattr(generation, "load_inception", Features)

    def unavailable():
        raise MissingWeights("Inception's classifier cannot be had: no network")

    monkeypatch.setattr(generation, "load_inception_classifier", unavailable)
    settings = GenerationEvaluationSettings(
        pipeline=str(tmp_path / "generator"), samples=7, batch_size=4, neighbours=5
    )
    data = ImageDataConfig(dataset=str(tmp_path / "photos"), resolution=16, num_workers=0)
    run(settings, data, accelerator)
    report = json.loads((tmp_path / "generator" / "evaluation.json").read_text())
    assert report["dataset"]["samples"] == 7 and report["metrics"]["gfid"] > 0
    assert report["notes"] == [
        "No Inception Score: Inception's classifier cannot be had: no network."
    ]
    assert report["settings"]["seed"] == 0 and report["settings"]["temperature"] == 1.0
    with pytest.raises(SettingsError, match="never saw"):
        run(settings, dataclasses.replace(data, validation_split="train"), accelerator)


def write_photos(folder: Path) -> None:
    """Eight training pictures, one of them broken, and three of validation."""
    for split, count, image in (
        ("train", 7, skimage.data.astronaut()),
        ("validation", 3, skimage.data.chelsea()),
    ):
        (folder / split).mkdir(parents=True)
        for index in range(count):
            row = 30 * index
            Image.fromarray(image[row : row + 64, 100:164]).save(folder / split / f"{index}.png")
    (folder / "train" / "broken.png").write_bytes(b"no image")


class NoFrechet:
    """The distance of 2,048 features takes seconds; the loop that feeds it counts what the test compares."""

    def update(self, features, real):
        pass

    def compute(self):
        return 0.0


@pytest.mark.soak  # the machinery is that of images, which `make test` runs on two ranks
def test_the_command_on_two_ranks_with_the_real_network(accelerator, tmp_path, monkeypatch):
    """Pictures from folders named for classes, of a number that ranks cannot share evenly."""
    try:
        inception = load_inception("package")
    except MissingWeights as error:
        pytest.skip(str(error))
    write_photos(tmp_path / "photos")
    coffee = skimage.data.coffee()
    for index in range(5):
        folder = tmp_path / "made" / ("cup" if index % 2 else "spoon")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(coffee[:32, 40 * index : 40 * index + 32]).save(folder / f"{index}.png")
    command = [str(REPOSITORY / "training" / "evaluate_generation.py")]
    command += [f"pictures={tmp_path / 'made'}", f"output={tmp_path / 'results'}", "neighbours=3"]
    command += [f"dataset={tmp_path / 'photos'}", "resolution=32", "batch_size=2"]
    command += ["num_workers=0", "inception_score=false", "samples=100"]
    done = launch(*command, launcher=TWO_RANKS)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "results" / "evaluation.json").read_text())
    assert report["dataset"]["samples"] == 5 and report["dataset"]["split"] == "train"
    settings = GenerationEvaluationSettings(
        pictures=str(tmp_path / "made"), output="none", neighbours=3, batch_size=2, samples=100
    )
    data = ImageDataConfig(dataset=str(tmp_path / "photos"), resolution=32, num_workers=0)
    monkeypatch.setattr(generation_figures, "frechet_distance", lambda device: NoFrechet())
    made = generation._generated(settings, data, accelerator)
    assert made.names == ["cup", "spoon"]
    one = evaluate(
        dataclasses.replace(made, loader=accelerator.prepare(made.loader)),
        generation._real_pictures(settings, data, accelerator),
        accelerator,
        inception,
        neighbours=3,
    )
    assert report["metrics"].pop("gfid") > 0 == one.metrics.pop("gfid")
    assert report["metrics"] == pytest.approx(one.metrics, rel=1e-5)
    assert report["fingerprint"] == one.fingerprint
    page = (tmp_path / "results" / "evaluation.md").read_text()
    assert "| gFID ↓ |" in page and "rFID" not in page
    assert (tmp_path / "results" / "samples.png").is_file()
