"""The authors' checkpoints, in the layout of their repository; here two tiny ones of their trainer."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from transformers import AutoModel

from hub_cards import convert_published as command
from hub_cards.convert_published import MANIFEST, read_manifest
from hub_cards.model_zoo import model_zoo, write_into

FIXTURES = Path(__file__).parents[1] / "fixtures"
README = Path(__file__).parents[2] / "README.md"


@pytest.fixture
def authors(tmp_path) -> Path:
    """A copy of their repository with two of eight checkpoints, and the manifest with these two's sizes."""
    folder = tmp_path / "authors"
    for place, fixture in (
        ("vq_log/simvq_1k", "image_tiny1"),
        ("vq_audio_log/simvq_4k", "audio_tiny1"),
    ):
        (folder / place).mkdir(parents=True)
        shutil.copy(FIXTURES / fixture / "checkpoint.ckpt", folder / place / "epoch=49-step=1.ckpt")
    content = yaml.safe_load(MANIFEST.read_text())
    for item in content["checkpoints"]:
        if item["codebook_size"] in (1024, 4096):
            item["codebook_size"] = 64
    (folder / "manifest.yaml").write_text(yaml.safe_dump(content))
    return folder


def convert(authors: Path, out: Path, *more: str) -> int:
    with pytest.raises(SystemExit) as done:
        command.main([str(authors), str(out), "--manifest", str(authors / "manifest.yaml"), *more])
    return done.value.code


@pytest.mark.slow
def test_what_is_there_is_converted_and_published(hub, authors, tmp_path, capsys):
    out = tmp_path / "out"
    assert convert(authors, out, "--push-to", "org") == 0
    assert capsys.readouterr().out.count("skipped, no .ckpt") == 6
    for name in ("simvq-imagenet128-k1024", "simvq-libritts24k-k4096"):
        assert AutoModel.from_pretrained(out / name).config.codebook_size == 64
        card = (out / name / "README.md").read_text()
        assert "reported by the authors of the paper, not measured by us" in card
        assert "base_model: zyx123/SimVQ" in card and "The weights are the authors'" in card
        assert (
            hub.files(f"org/{name}")["evaluation.json"]
            == (out / name / "evaluation.json").read_bytes()
        )
    assert "| PSNR, dB ↑ | 22.34 |" in (out / "simvq-imagenet128-k1024" / "README.md").read_text()
    clean, other = json.loads((out / "simvq-libritts24k-k4096" / "evaluation.json").read_text())
    assert clean["metrics"]["pesq"] == 2.33 and other["metrics"]["pesq"] == 2.08
    assert clean["source"] == "authors"


def test_a_checkpoint_in_the_wrong_place_is_not_passed_on(authors, tmp_path, capsys):
    shutil.copy(
        authors / "vq_audio_log/simvq_4k/epoch=49-step=1.ckpt", authors / "vq_log/simvq_1k/x.ckpt"
    )
    out, only = tmp_path / "out", ("--only", "simvq-imagenet128-k1024")
    assert convert(authors, out, *only) == 1
    assert "several checkpoints" in capsys.readouterr().out
    (authors / "vq_log/simvq_1k/epoch=49-step=1.ckpt").unlink()
    assert convert(authors, out, *only) == 1
    assert "simvq_audio model" in capsys.readouterr().out
    assert not list(out.iterdir())
    assert convert(authors, out, "--only", "nothing") == 2


def test_the_manifest_holds_what_the_paper_says():
    entries = {entry.name: entry for entry in read_manifest()}
    assert len(entries) == 8
    for entry in entries.values():
        assert str(entry.codebook_size) in entry.name
        assert len(entry.evaluations) == (1 if entry.modality == "image" else 2)
    assert entries["simvq-imagenet128-k65536"].evaluations[0].metrics["rfid"] == 2.24
    assert entries["simvq-libritts24k-k262144"].evaluations[1].metrics["utilisation"] == 0.947


def test_the_table_in_the_readme_is_that_of_the_manifest(tmp_path):
    assert model_zoo(read_manifest()) in README.read_text()
    (tmp_path / "README.md").write_text("no marks")
    with pytest.raises(ValueError, match="lacks the lines"):
        write_into(tmp_path / "README.md", "x")


def test_a_wrong_checkpoint_leaves_an_earlier_conversion_alone(authors, tmp_path):
    folder = tmp_path / "out" / "simvq-imagenet128-k1024"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("theirs")
    (authors / "vq_log/simvq_1k/epoch=49-step=1.ckpt").unlink()
    shutil.copy(
        authors / "vq_audio_log/simvq_4k/epoch=49-step=1.ckpt", authors / "vq_log/simvq_1k/x.ckpt"
    )
    assert convert(authors, tmp_path / "out", "--only", folder.name) == 1
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
