"""Generators on the one loop, in this process: what is learnt, validation, resume, broken rows, mistakes."""

import json
import math

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from modeling_simvq import SimVQForAudioGeneration, SimVQForImageGeneration
from training.generator_recipe import (
    GeneratorLoopSettings,
    GeneratorModelSettings,
    build_generator_recipe,
)
from training.launch import make_accelerator, train
from training.settings import SettingsError, build_settings
from training.token_data import AudioTokenDecoder, ImageTokenDecoder, TokenDataConfig

GROUPS = {"data": TokenDataConfig, "model": GeneratorModelSettings, "loop": GeneratorLoopSettings}
TINY = {
    "codebook_size": 40,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "batch_size": 8,
    "num_workers": 0,
    "tracker": "none",
    "learning_rate": 5e-3,
    "warmup_steps": 2,
    "ema_decay": 0.5,
}


@pytest.fixture
def run(tmp_path):
    """Trains with the tiny settings and others; gives back the trainer."""

    def start(dataset, **settings):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        values = TINY | {"dataset": str(dataset), "output_dir": str(tmp_path / "run")} | settings
        groups = build_settings(GROUPS, values)
        return train(groups, build_generator_recipe, make_accelerator(groups["loop"]))

    return start


def write_split(folder, split: str, rows: dict, features: dict) -> None:
    (folder / "data").mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    table.to_parquet(str(folder / f"data/{split}-00000.parquet"))


@pytest.fixture(scope="module")
def picture_codes(tmp_path_factory):
    """Three classes, each of codes from a range of its own: 10, 5 and 1 of them."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    features = {
        "label": datasets.ClassLabel(names=["wide", "narrow", "one"]),
        "image_codes": datasets.List(datasets.List(datasets.Value("uint8"))),
    }
    for split, count in (("train", 96), ("validation", 21)):
        labels = [n % 3 for n in range(count)]
        ranges = [(0, 10), (20, 25), (30, 31)]
        codes = [random.integers(*ranges[label], (3, 4)).tolist() for label in labels]
        write_split(folder, split, {"label": labels, "image_codes": codes}, features)
    return folder


def test_classes_are_learnt_and_the_figures_are_those_of_the_saved_model(
    run, picture_codes, tmp_path
):
    run(picture_codes, max_steps=80, validate_every=40)
    lines = (tmp_path / "run" / "figures.jsonl").read_text().splitlines()
    figures = json.loads(lines[-1])
    # The entropies of the classes: log 10, log 5 and 0.
    best = (math.log(10) + math.log(5)) / 3
    assert best - 0.1 < figures["loss"] < best + 0.35
    assert figures["bits_per_code"] == pytest.approx(figures["loss"] / math.log(2))

    model = SimVQForImageGeneration.from_pretrained(tmp_path / "run" / "model").eval()
    assert model.config.grid_size == [3, 4] and model.config.id2label[1] == "narrow"
    rows = datasets.load_dataset(
        str(picture_codes), split="validation", cache_dir=str(tmp_path)
    ).with_format("torch")
    codes, labels = rows["image_codes"][:].long(), rows["label"][:]
    with torch.no_grad():
        loss = float(model(image_codes=codes, class_labels=labels).loss)
        unconditional = float(model(image_codes=codes).loss)
    assert figures["loss"] == pytest.approx(loss, rel=1e-5)
    # The null class was trained too, by label dropout; one code gives the class away, the first costs more.
    assert loss < unconditional < loss + 1


def test_resume_goes_on_bit_for_bit(run, picture_codes, tmp_path):
    whole = run(picture_codes, max_steps=6, label_dropout=0.5, output_dir=str(tmp_path / "whole"))
    run(picture_codes, max_steps=3, label_dropout=0.5, lr_schedule="constant")
    constant = run(picture_codes, max_steps=6, label_dropout=0.5, resume="latest")
    assert constant.progress.step == 6
    for (name, tensor), other in zip(
        whole.recipe.model.state_dict().items(),
        constant.recipe.model.state_dict().values(),
        strict=True,
    ):
        assert tensor.shape == other.shape, name
