"""`make demo`, with fine-tunings of a few steps: figures, pictures, recordings and the page of both."""

import json

import pytest
import soundfile
from PIL import Image

from tests.support.programs import launch
from training.demo import audio, image, launcher, sheet

REPOSITORY = launcher.REPOSITORY


@pytest.fixture
def few_steps(monkeypatch):
    """The demos' trainings, of two steps."""

    def train(script: str, config: str, *overrides: str) -> None:
        words = ["--config", REPOSITORY / "training" / "configs" / config, *overrides]
        steps = ["max_steps=2", "validate_every=2", "save_every=2", "tracker=none"]
        done = launch(REPOSITORY / "training" / script, *words, *steps)
        assert done.returncode == 0, done.stdout + done.stderr

    for module in (image, audio):
        monkeypatch.setattr(module, "launch_trainer", train)


@pytest.mark.slow
def test_both_demos_and_their_page(few_steps, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(image, "PHOTOS", ("chelsea", "flower"))
    for name, demo in (("image", image), ("audio", audio)):
        folder = tmp_path / name
        folder.mkdir()
        demo.show(folder, tuned=False)
        demo.train(folder)
        demo.show(folder, tuned=True)
    said = capsys.readouterr().out
    assert "never saw" in said and "never heard" in said and "the model, for AutoModel" in said

    found = json.loads((tmp_path / "image" / "figures.json").read_text())
    cat = found["photos"]["chelsea"]
    assert cat["tokens"] == 32 * 48 and cat["psnr"] > cat["psnr_8x8_block_means"]
    assert cat["webp"]["bytes"] <= cat["bytes"]
    assert 0 < found["used"] <= 1 and found["tissue"]["psnr_after"] > 10
    assert Image.open(tmp_path / "image" / "chelsea.png").size[0] > 700
    heard = json.loads((tmp_path / "audio" / "figures.json").read_text())
    assert 0 < heard["stoi"] <= 1 and heard["voice"]["mel_distance_after"] > 0
    assert soundfile.info(tmp_path / "audio" / "reconstruction.wav").duration > 5

    page = sheet.write_sheet(tmp_path).read_text()
    assert page.count("<audio") == 5 and page.count("<img") == 4
    assert "data:audio/wav;base64," in page and 'src="image/' not in page


def test_a_page_of_one_demo_alone(tmp_path):
    assert "<audio" not in sheet.write_sheet(tmp_path).read_text()
