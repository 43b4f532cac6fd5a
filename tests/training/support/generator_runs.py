"""Codes to train generators on, and runs of a tiny one in this process."""

from pathlib import Path

import datasets
import numpy as np
from accelerate.state import AcceleratorState, GradientState

from training.data.codes import TokenDataConfig
from training.recipes.drawn_samples import SampleSettings
from training.recipes.generator import (
    GeneratorLoopSettings,
    GeneratorModelSettings,
    GeneratorRecipe,
    build_generator_recipe,
)
from training.recipes.run import make_accelerator, train
from training.runtime.settings import build_settings

GROUPS = {
    "data": TokenDataConfig,
    "model": GeneratorModelSettings,
    "samples": SampleSettings,
    "loop": GeneratorLoopSettings,
}
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


def train_here(dataset: Path, output_dir: Path, **settings) -> GeneratorRecipe:
    """Train with the tiny settings and others; gives back the recipe."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    values = TINY | {"dataset": str(dataset), "output_dir": str(output_dir)} | settings
    groups = build_settings(GROUPS, values)
    recipes = []

    def build(**options):
        recipes.append(build_generator_recipe(**options))
        return recipes[0]

    train(groups, build, make_accelerator(groups["loop"]))
    return recipes[0]


def write_split(folder: Path, split: str, rows: dict, features: dict) -> None:
    """A split as training/tokenize_dataset.py writes it."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    table.to_parquet(str(folder / f"data/{split}-00000.parquet"))


def write_picture_codes(folder: Path, num_quantizers: int = 1) -> Path:
    """Three classes, each of codes from a range of its own: 10, 5 and 1 of them."""
    random = np.random.default_rng(0)
    column, shape = datasets.List(datasets.List(datasets.Value("uint8"))), (3, 4)
    if num_quantizers > 1:
        column, shape = datasets.List(column), (num_quantizers, *shape)
    features = {
        "label": datasets.ClassLabel(names=["wide", "narrow", "one"]),
        "image_codes": column,
    }
    for split, count in (("train", 96), ("validation", 21)):
        labels = [n % 3 for n in range(count)]
        ranges = [(0, 10), (20, 25), (30, 31)]
        codes = [random.integers(*ranges[label], shape).tolist() for label in labels]
        write_split(folder, split, {"label": labels, "image_codes": codes}, features)
    return folder
