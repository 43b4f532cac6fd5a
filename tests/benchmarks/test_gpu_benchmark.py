"""`make gpu` without a GPU: it says so; and what it does can be done, tiny, on a CPU."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from training.runtime.fast_math import FastMath

PATH = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture
def gpu(monkeypatch, one_thread):
    """The script; called with arguments, it returns its status."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("gpu_benchmark", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", [str(PATH), *map(str, arguments)])
        return module.main()

    call.module = module
    return call


@pytest.fixture
def one_thread():
    """Tiny sizes: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_told(gpu, tmp_path, capsys):
    assert gpu("--output", tmp_path / "gpu.json") == 2
    assert "needs a GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_parts_on_a_cpu(gpu, tmp_path):
    """All but the tests, of which this is one, and the quantizer, whose script has its own."""
    parts, written = "steps,encoding,sampling", tmp_path / "gpu.json"
    tiny = ("--device", "cpu", "--tiny", "--output", written)
    assert gpu(*tiny, "--parts", parts) == 0
    results = json.loads(written.read_text())
    assert set(results) == {"machine", *parts.split(",")}
    ways = ["all", *(f"without {name}" for name in vars(FastMath())), "none"]
    assert list(results["steps"]) == [f"{way}, no" for way in ways]
    assert all(row["images_per_second"] > 0 for row in results["steps"].values())
    assert results["encoding"]["images_per_second"] > 0
    text = written.with_suffix(".md").read_text()
    assert all(f"| {way}, no |" in text for way in ways) and "tokens a second" in text
    assert gpu.module.fast_math.chosen == FastMath()


def test_the_table_has_the_quantizer_and_the_tests(gpu):
    row = {"codes": 8192, "tokens": 256, "width": 128, "search": 1e-3}
    row |= {"step": {"ours": 2e-3, "published": 5e-3}, "peak": {"ours": 14, "published": None}}
    results = {"machine": {"gpu": "none"}, "quantizer": {"sizes": [row]}}
    text = gpu.module.table(results | {"tests": {"status": 0, "summary": ["21 passed"]}})
    assert "| 8,192 | 256 | 128 | ours 2.00, published 5.00 | 1.00 | ours 14 |" in text
    assert "Tests: 21 passed" in text
