"""Damaged files of every kind that the trainers, the evaluators and the cards read."""

import json
import random

import pytest
import torch
import yaml

from hub_cards.evaluation import read_evaluations
from tests.fuzzing import NASTY, fuzz, mutated_bytes, mutated_tree, tries
from tests.training.support.dirty_files import dirty_pictures, dirty_recordings
from training.data.images import ImageDataConfig, decode_pixels
from training.data.recordings import AudioDataConfig, decode_audio
from training.loop.settings import LoopSettings
from training.recipes.image import ImageLossSettings, ImageModelSettings
from training.runtime.settings import parse_settings


@pytest.mark.slow
@tries(400, 30_000)
def test_pictures(count):
    files = [file.content for name, file in dirty_pictures().items() if name != "bomb.png"]
    source = random.Random(10)

    def use(content):
        pixels = decode_pixels({"bytes": content, "path": None}, "row 0", None, 16)
        assert pixels.shape == (3, 16, 16) and pixels.isfinite().all()

    inputs = (mutated_bytes(source.choice(files), source) for _ in range(count))
    fuzz("pictures", inputs, use)


@tries(300, 30_000)
def test_recordings(count):
    files = [file.content for file in dirty_recordings().values()]
    source = random.Random(11)

    def use(content):
        clip = source.choice([None, 1_000])
        generator = torch.Generator().manual_seed(0)
        wave = decode_audio({"bytes": content, "path": None}, 24_000, clip, generator, "row 0")
        assert wave.ndim == 2 and len(wave) == 1 and wave.isfinite().all()

    inputs = (mutated_bytes(source.choice(files), source) for _ in range(count))
    fuzz("recordings", inputs, use)


SETTINGS = {"data": ImageDataConfig, "model": ImageModelSettings, "loss": ImageLossSettings}
SETTINGS |= {"loop": LoopSettings}
YAML = """
dataset: photos
resolution: 32
channel_multipliers: [1, 2]
codebook_size: 64
quantizer: simvq
quantizer_options: {rotation_trick: true}
learning_rate: 1e-4
adam_betas: [0.5, 0.9]
max_steps: null
mixed_precision: no
output_dir: runs/x
"""
# What YAML can do beyond plain values; aliases of aliases grow to 10^9 items.
HOSTILE_YAML = [
    b"output_dir: !!python/object/apply:os.system ['true']",
    b"!!python/name:os.system",
    b"output_dir: !!python/object/new:type {args: [x, [], {}]}",
    b"a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\noutput_dir: *b",
    b"<<: &x {resolution: 32}\n<<: *x",
    b"resolution: 0x20",
    b"resolution: 1_000_000_000_000",
    b"? [a, b]\n: c",
    b"%YAML 9.9\n---\nx",
    b"--- a\n--- b",
    b"\xff\xfe",
    b"output_dir: *nothing",
]


@pytest.mark.slow
@tries(600, 10_000)
def test_settings(count, tmp_path):
    source = random.Random(12)
    plain = yaml.safe_load(YAML)

    def inputs():
        yield from HOSTILE_YAML
        for _ in range(count - len(HOSTILE_YAML)):
            if source.random() < 0.5:
                yield mutated_bytes(YAML.encode(), source)
            else:
                yield yaml.safe_dump(mutated_tree(plain, source)).encode()

    def use(one):
        (tmp_path / "some.yaml").write_bytes(one)
        parse_settings(SETTINGS, "", ["--config", str(tmp_path / "some.yaml")])

    account = fuzz("settings files", inputs(), use)
    assert account.accepted > count // 20 and account.refused > count // 5
    words = [f"{name}={value}" for name in ("resolution", "epochs") for value in NASTY]
    groups = {"data": AudioDataConfig, "loop": LoopSettings}
    fuzz(
        "settings on the command line", iter(words), lambda word: parse_settings(groups, "", [word])
    )


@tries(300, 30_000)
def test_evaluations(count, tmp_path):
    """evaluation.json, which comes from a model's folder and goes into its card."""
    whole = {
        "dataset": {
            "name": "photos, test",
            "id": "a/b",
            "config": "c",
            "split": "test",
            "samples": 7,
        },
        "metrics": {"psnr": 20.5, "utilisation": 0.5, "perplexity": 100.0},
        "protocol": "as it was",
        "source": "measured",
        "intervals": {"psnr": 0.1},
    }
    source = random.Random(13)

    def inputs():
        for _ in range(count):
            if source.random() < 0.3:
                yield mutated_bytes(json.dumps(whole).encode(), source)
            else:
                yield json.dumps(mutated_tree(whole, source)).encode()

    def use(one):
        (tmp_path / "evaluation.json").write_bytes(one)
        for evaluation in read_evaluations(tmp_path / "evaluation.json"):
            assert evaluation.rows()

    fuzz("evaluation.json", inputs(), use)
