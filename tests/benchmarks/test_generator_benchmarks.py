"""The generators' benchmarks measure what they say, at toy size."""

import importlib.util
from pathlib import Path

import torch

from modeling_simvq import SimVQForImageGeneration, SimVQImageGenerationConfig


def load(name: str):
    path = Path(__file__).parents[2] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_way_of_the_loss_prints_two_figures(capsys):
    memory = load("generator_memory")
    for way in memory.WAYS:
        memory.measure(way, size=64, tokens=8, width=16, runs=1)
        mebibytes, milliseconds = capsys.readouterr().out.split()
        assert int(mebibytes) >= 0 and int(milliseconds) >= 0


def test_each_way_of_sampling_has_a_rate():
    speed = load("sampling_speed")
    config = SimVQImageGenerationConfig(
        codebook_size=8,
        grid_size=(2, 2),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    torch.manual_seed(0)
    rates = speed.measure(SimVQForImageGeneration(config).eval(), batch=2, runs=1)
    assert rates.keys() == speed.WAYS.keys() and min(rates.values()) > 0
