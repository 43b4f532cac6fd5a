"""The real command in a subprocess: accelerate launch training/train_image.py."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
import yaml
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

import modeling_simvq  # noqa: F401  (registers the Auto classes)
from tests.support.programs import CPU, PLAIN_LAUNCH, TWO_RANKS, launch, run
from training.export_checkpoint import export_checkpoint

REPOSITORY = Path(__file__).parents[2]
SCRIPT = str(REPOSITORY / "training" / "train_image.py")
CONFIGS = REPOSITORY / "training" / "configs"
TINY = """
resolution: 32
num_workers: 0
base_channels: 32
channel_multipliers: [1, 2]
num_res_blocks: 1
codebook_size: 64
codebook_dim: 16
discriminator_channels: 8
batch_size: 4
log_every: 1
validate_every: 2
save_every: 2
tracker: none
"""


@pytest.fixture
def photos(tmp_path) -> Path:
    """Real tiles of a photograph, one broken file among them, and the tiny configuration."""
    astronaut = skimage.data.astronaut()
    for split, count in (("train", 16), ("validation", 3)):
        (tmp_path / "photos" / split).mkdir(parents=True)
        for index in range(count):
            top, left = 64 * (index // 4), 64 * (index % 4)
            tile = Image.fromarray(astronaut[top : top + 64, left : left + 64])
            tile.save(tmp_path / "photos" / split / f"{index}.png")
    (tmp_path / "photos" / "train" / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "tiny.yaml").write_text(TINY)
    return tmp_path / "photos"


def words(photos: Path, *overrides: str) -> list[str]:
    """Command line of a small training."""
    paths = [f"dataset={photos}", f"output_dir={photos.parent / 'run'}"]
    return [SCRIPT, "--config", str(photos.parent / "tiny.yaml"), *paths, *overrides]


def said(result: subprocess.CompletedProcess) -> str:
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.mark.slow
def test_train_with_lpips_resume_and_load(photos, tmp_path):
    # With this seed the broken file comes first.
    start = words(photos, "perceptual=vgg", "max_steps=2", "tracker=tensorboard", "seed=4")
    output = said(launch(*start, cwd=tmp_path))
    assert "broken.jpg" in output and "unreadable: 1 samples" in output
    assert "Warning" not in output and "Traceback" not in output, output
    run = tmp_path / "run"
    more = words(photos, "perceptual=vgg", "max_steps=4", "seed=4", "--resume", "latest")
    output = said(launch(*more, cwd=tmp_path))
    assert "at step 2" in output
    # What was changed is said and kept; figures are in the plain log; the run is marked as finished.
    assert "resume: from step 2 on: max_steps 2 -> 4" in output
    record = json.loads((run / "settings.json").read_text())
    assert record["max_steps"] == 4 and record["changes"][0]["max_steps"] == [2, 4]
    assert "step 3 of 4: loss " in output and "perceptual" in output
    assert json.loads((run / "finished.json").read_text()) == {"step": 4}
    shown = json.loads((run / "model" / "training_settings.json").read_text())
    assert shown["trained_steps"] == 4 and str(photos) not in json.dumps(shown)
    assert (run / "best_model" / "model.safetensors").is_file()
    assert not [path for path in run.iterdir() if path.name.startswith((".", "aside"))]
    exported = export_checkpoint(run, tmp_path / "exported")
    for name in ("model.safetensors", "config.json", "preprocessor_config.json", "evaluation.json"):
        assert (exported / name).read_bytes() == (run / "model" / name).read_bytes(), name
    lines = [json.loads(line) for line in (run / "figures.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert lines[0]["lpips"] > 0
    assert list((run / "tensorboard").rglob("events*"))
    grid = np.asarray(Image.open(run / "reconstructions" / "step-00000004.png"))
    assert grid.shape == (2 * 34 + 2, 3 * 34 + 2, 3)

    model = AutoModel.from_pretrained(run / "model").eval()
    processor = AutoImageProcessor.from_pretrained(run / "model")
    inputs = processor(Image.open(photos / "validation" / "0.png"), return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 32, 32)
    with torch.no_grad():
        codes = model.encode(**inputs).image_codes
        decoded = model.decode(image_codes=codes).pixel_values
    assert codes.shape == (1, 16, 16) and decoded.isfinite().all()
    assert not model.quantizer.basis.requires_grad


@pytest.mark.slow
def test_two_processes_share_the_work_and_publish_it_once(photos, tmp_path, hub):
    """Real processes throughout: `accelerate launch` as users type it."""
    command = [sys.executable, "-m", "accelerate.commands.launch", *PLAIN_LAUNCH, *TWO_RANKS]
    command += words(photos, "perceptual=none", "max_steps=2", "gradient_accumulation_steps=2")
    command += ["autoencoder_steps=1", "--push-to-hub", "hub_model_id=org/two-ranks"]
    environment = os.environ | CPU | {"HF_HUB_OFFLINE": "0"} | hub.environment(tmp_path / "home")
    result = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    output = said(result)
    assert "2 process(es) on cpu" in output
    assert "16 samples per step" in output
    lines = (tmp_path / "run" / "figures.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2]
    AutoModel.from_pretrained(tmp_path / "run" / "model")

    assert f"published: {hub.url}/org/two-ranks" in output
    assert len(hub.repository("org/two-ranks").commits) == 2  # the empty one, and one of both ranks
    files = hub.files("org/two-ranks")
    assert not any(str(tmp_path).encode() in content for content in files.values())
    evaluation = json.loads(files["evaluation.json"])
    assert evaluation["source"] == "training" and evaluation["metrics"]["psnr"] > 0
    assert b"codebook_size: 64" in files["README.md"]


@pytest.mark.slow
def test_a_mistake_is_one_line(photos):
    result = run(*words(photos, "resolution=33", "perceptual=none"))
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: resolution") and "33" in last


@pytest.mark.slow
def test_help_teaches():
    result = run(SCRIPT, "--help")
    assert result.returncode == 0
    for word in ("dataset", "codebook_size", "perceptual", "max_steps", "accelerate launch"):
        assert word in result.stdout


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("[!g]*image*.yaml")))
def test_shipped_configurations_are_valid(file):
    from training.data.images import ImageDataConfig
    from training.recipes.image import ImageLossSettings, ImageModelSettings
    from training.recipes.tokenizer import TokenizerLoopSettings
    from training.runtime.settings import parse_settings

    groups = {"data": ImageDataConfig, "model": ImageModelSettings, "loss": ImageLossSettings}
    settings = parse_settings(
        {**groups, "loop": TokenizerLoopSettings}, "", ["--config", str(file)]
    )
    config = settings["model"].config()
    resolution = settings["data"].resolution
    assert resolution % config.downsample_factor == 0
    if file.stem.startswith("imagenet"):
        side, codes = re.fullmatch(r"imagenet(\d+)_k(\d+)(?:_\w+)?", file.stem).groups()
        assert (resolution, config.codebook_size) == (int(side), int(codes))
        assert resolution // config.downsample_factor == 16
        # The paper's tokenizers have no attention; those they are compared with at 256 pixels have.
        assert config.attention == (resolution == 256)


@pytest.mark.parametrize(
    "file", sorted(CONFIGS.glob("*_autoencoder_first.yaml")), ids=lambda f: f.stem
)
def test_a_first_phase_is_all_that_differs_from_the_published_configuration(file):
    published = file.stem.removesuffix("_autoencoder_first")
    ours, theirs = (
        yaml.safe_load(path.read_text()) for path in (file, CONFIGS / f"{published}.yaml")
    )
    assert ours.pop("autoencoder_steps") > 0 and ours.pop("codes_from_latents")
    assert ours == theirs | {"output_dir": f"runs/{file.stem}"}
