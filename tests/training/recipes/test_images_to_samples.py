"""The README's way from images to samples, its very commands, at toy size."""

import contextlib
import json
import re
import shlex
from pathlib import Path

import datasets
import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from transformers import AutoModel

import modeling_simvq  # noqa: F401  (registers the models)
from tests.support.programs import ONE_PROCESS, TWO_RANKS, launch
from training.data.images import decode_image, image_to_pixels
from training.export_checkpoint import export_checkpoint

REPOSITORY = Path(__file__).parents[3]
RUN = ["log_every=1", "tracker=none", "num_workers=0"]
# What makes each command small.
TOY = {
    "train_image.py": [
        *RUN, "resolution=32", "base_channels=32", "channel_multipliers=[1,2,2]", "num_res_blocks=1",
        "codebook_size=64", "codebook_dim=16", "discriminator_channels=8", "perceptual=none", "batch_size=8",
        "max_steps=4", "mixed_precision=no",
    ],
    "tokenize_dataset.py": ["resolution=32", "rows_per_file=8", "batch_size=8", "num_workers=1"],
    "train_generator.py": [
        *RUN, "hidden_size=32", "intermediate_size=64", "num_hidden_layers=2", "num_attention_heads=2",
        "batch_size=8", "max_steps=6", "validate_every=3", "warmup_steps=1", "learning_rate=0.005",
        "ema_decay=0.5", "samples=2", "push_to_hub=true", "hub_model_id=org/made",
    ],
}  # fmt: skip
CLASSES = ("astronaut", "coffee", "chelsea")


def documented(language: str) -> str:
    """The first block of code under the README's heading."""
    section = (REPOSITORY / "README.md").read_text().split("\n## Generate")[1].split("\n## ")[0]
    return re.search(rf"```{language}\n(.*?)```", section, re.DOTALL)[1]


def documented_commands() -> list[list[str]]:
    """Words of the commands."""
    block = documented("bash").replace("\\\n", " ")
    lines = [line for line in block.splitlines() if line and not line.startswith("#")]
    return [shlex.split(line) for line in lines]


@pytest.fixture
def photos(tmp_path) -> Path:
    for name in CLASSES:
        picture = getattr(skimage.data, name)()
        for split, numbers in (("train", range(8)), ("validation", range(8, 11))):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for n in numbers:
                Image.fromarray(picture[20 * n : 20 * n + 64, 60:124]).save(folder / f"{n}.png")
    return tmp_path / "photos"


def run(words: list[str], cwd: Path, processes: int = 1, **environment: str) -> str:
    """A command of the README, small, in this folder."""
    assert words[:2] == ["accelerate", "launch"]
    script = Path(words[2]).name
    words = [str(REPOSITORY / w) if w.startswith("training/") else w for w in words[2:]]
    words = [w.replace("path/to/photos", "photos") for w in words]
    launcher = TWO_RANKS if processes > 1 else ONE_PROCESS
    done = launch(*words, *TOY[script], launcher=launcher, cwd=cwd, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and "HTTP Request" not in done.stderr, done.stderr
    return done.stdout + done.stderr


@pytest.mark.soak
@pytest.mark.slow
def test_images_to_samples(photos, tmp_path, hub, monkeypatch):
    tokenizer_words, tokenize_words, generator_words = documented_commands()
    run(tokenizer_words, tmp_path)
    output = run(tokenize_words, tmp_path)
    assert "train: 48 rows, validation: 18 rows in runs/codes" in output
    assert re.search(r"66 images encoded in .* codes a second", output)
    # Two ranks, whose last validation batch is filled up: 18 rows by 8 each.
    environment = hub.environment(tmp_path / "home")
    output = run(generator_words, tmp_path, 2, **environment)

    tokenizer = AutoModel.from_pretrained(tmp_path / "runs/tokenizer/model").eval()
    rows = datasets.load_dataset(
        str(tmp_path / "runs/codes"), split="validation", cache_dir=str(tmp_path / "cache")
    )
    assert rows.features["label"].names == sorted(CLASSES)
    row = rows[1]
    assert row["flipped"] and row["source_row"] == 0
    file = sorted((photos / "validation" / "astronaut").iterdir())[0]
    pixels = image_to_pixels(decode_image({"bytes": file.read_bytes(), "path": None}), 32).flip(-1)
    with torch.no_grad():
        live = tokenizer.encode(pixels[None]).image_codes
        assert live[0].tolist() == row["image_codes"]

    run_folder = tmp_path / "runs/generator"
    figures = [json.loads(line) for line in (run_folder / "figures.jsonl").read_text().splitlines()]
    assert [line["step"] for line in figures] == [3, 6]
    generator = AutoModel.from_pretrained(run_folder / "model").eval()
    everything = rows.with_format("torch")[:]
    with torch.no_grad():
        loss = generator(
            image_codes=everything["image_codes"].long(), class_labels=everything["label"]
        ).loss
    assert figures[-1]["loss"] == pytest.approx(float(loss), rel=1e-5)
    sheet = Image.open(run_folder / "samples/step-00000006.png")
    assert sheet.size == (2 * 34 + 2, 3 * 34 + 2)

    with contextlib.chdir(tmp_path):  # the tokenizer was named from there
        exported = export_checkpoint(run_folder, tmp_path / "exported")
    assert exported.name == "pipeline"
    for part in ("tokenizer", "transformer"):
        weights = f"{part}/model.safetensors"
        assert (exported / weights).read_bytes() == (run_folder / "pipeline" / weights).read_bytes()

    assert f"published: {hub.url}/org/made" in output
    files = hub.files("org/made")
    assert {"model_index.json", "samples/samples.png", "evaluation.json"} <= set(files)
    assert {"tokenizer/model.safetensors", "transformer/model.safetensors"} <= set(files)
    assert not any(str(tmp_path).encode() in content for content in files.values())
    card = files["README.md"].decode()
    assert 'DiffusionPipeline.from_pretrained("org/made", trust_remote_code=True)' in card
    assert "pipeline('astronaut', num_images=4" in card
    assert "Rows: astronaut, chelsea, coffee" in card and "| bits for a code ↓ |" in card

    from modeling_simvq import SimVQImagePipeline

    pipeline = SimVQImagePipeline.from_pretrained("org/made", cache_dir=str(tmp_path / "cache"))
    made = pipeline("coffee", num_images=2, generator=torch.Generator().manual_seed(0)).images
    assert [picture.size for picture in made] == [(32, 32)] * 2
    assert np.asarray(made[0]).std() > 0
    snippet = documented("python")
    assert '"tench"' in snippet
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet.replace("tench", "coffee"), "README.md", "exec"), {})
    assert Image.open(tmp_path / "coffee.png").size == (32, 32)
    codes = generator.generate_images(
        torch.tensor([1, 1]), generator=torch.Generator().manual_seed(0)
    )
    assert codes.shape == (2, 8, 8) and 0 <= codes.min() <= codes.max() < 64
