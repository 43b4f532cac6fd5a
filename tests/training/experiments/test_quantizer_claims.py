"""The experiments on the quantizer alone: memory, other data, the toy in two dimensions."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.support import programs
from training.experiments import memory, other_data, toy

REPOSITORY = Path(__file__).parents[3]


@pytest.mark.slow
def test_memory_of_training_is_that_of_w_and_not_of_the_codes(tmp_path, monkeypatch):
    """Gradients and two moments of float32: 12 bytes a number, of W and b or of all codes."""
    if not Path("/proc/self/clear_refs").exists() and not torch.cuda.is_available():
        pytest.skip("the peak is read from Linux's /proc or from CUDA")

    def run(command: list[str], **_) -> subprocess.CompletedProcess:
        return programs.run(*command[1:], cwd=REPOSITORY)

    monkeypatch.setattr(memory.subprocess, "run", run)
    memory.main(["--sizes", "32768", "--output", str(tmp_path)])
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    simvq, trained = runs
    assert [simvq["variant"], trained["variant"]] == list(memory.SYSTEMS)
    assert simvq["training"] == pytest.approx(12 * (128 * 128 + 128) / 2**20)
    assert trained["training"] == pytest.approx(12 * 32_768 * 128 / 2**20)  # 48 MiB
    assert trained["peak"] > simvq["peak"] + 30
    assert (tmp_path / "figure.png").stat().st_size > 5_000


@pytest.mark.slow
def test_joint_optimisation_moves_every_code(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "STEPS", 40)
    monkeypatch.setattr(toy, "SHOWN", (0, 10, 40))
    monkeypatch.setattr(toy, "FRAMES", 4)
    toy.main(["--output", str(tmp_path), "--seeds", "0,1"])
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    for disjoint, joint in zip(runs[::2], runs[1::2], strict=True):
        assert disjoint["steps"]["0"] == joint["steps"]["0"]  # the same start
        last = disjoint["steps"]["40"], joint["steps"]["40"]
        assert last[1]["utilisation"] > 2 * last[0]["utilisation"]
        assert last[1]["error"] < last[0]["error"] / 2
    with Image.open(tmp_path / "animation.gif") as animation:
        assert animation.n_frames == 5


@pytest.mark.slow
def test_codes_that_are_not_picked_stay_where_they_are_without_w():
    found = toy.train(toy.SYSTEMS["plain VQ: codes are trained (disjoint)"], toy.targets(0), 0)
    moved = (found["path"][-1] != found["path"][0]).any(dim=1)
    assert 0 < moved.sum() < toy.CODES / 2
    joint = toy.train({}, toy.targets(0), 0)["path"]
    assert (joint[-1] != joint[0]).any(dim=1).all()


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(other_data, "LARGEST", 4096)
    monkeypatch.setattr(other_data, "BATCH", 1024)


@pytest.mark.slow
def test_simvq_uses_more_codes_than_plain_vq(small, tmp_path):
    pytest.importorskip("vector_quantize_pytorch")
    other_data.main(
        ["--data", "gaussian", "--sizes", "1024", "--steps", "60"]
        + ["--output", str(tmp_path), "--work", str(tmp_path / "work")]
    )
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    found = {run["system"]: run for run in runs}
    assert set(found) == {"simvq", "vq", "vq_ema", "fc", "fsq", "lfq"}
    assert len({run["hash"] for run in runs}) == 6 and found["fsq"]["size"] == 1024
    assert found["simvq"]["utilisation"] > 2 * found["vq"]["utilisation"]
    assert found["simvq"]["error"] < found["vq"]["error"]
    assert "| gaussian | 1,024 | SimVQ |" in (tmp_path / "README.md").read_text()


@pytest.mark.slow
def test_the_hash_knows_all_that_a_run_depends_on(small, tmp_path, monkeypatch):
    """Also what is no argument: a learning rate that is edited must not keep the hash."""
    words = ["--data", "gaussian", "--sizes", "64", "--steps", "1", "--output", str(tmp_path)]
    words += ["--work", str(tmp_path / "work")]
    monkeypatch.setattr(other_data, "PAPER", ("simvq",))
    found = []
    for rate in (1e-2, 1e-3, 1e-2):
        monkeypatch.setattr(other_data, "LEARNING_RATE", rate)
        other_data.main(words)
        found.append(json.loads((tmp_path / "results.json").read_text())["runs"][0]["hash"])
    assert found[0] == found[2] != found[1]
    # What is done is not done again.
    monkeypatch.setattr(other_data, "run", None)
    other_data.main(words)


def test_data_whose_package_is_missing_is_left_out(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="none of the data"):
        other_data.main(["--data", "text,video", "--output", str(tmp_path)])
    lines = capsys.readouterr().err
    assert "pip install --no-deps wordllama" in lines and "--videos" in lines


def test_sentences_of_docstrings(tmp_path):
    (tmp_path / "one.py").write_text(
        '"""The first sentence here. Short one.\n\nA second\nsentence is it."""\n'
    )
    (tmp_path / "two.py").write_text('def f():\n    """The first sentence here."""\n')
    (tmp_path / "broken.py").write_text("def (")
    found = other_data.docstring_sentences(tmp_path)
    assert found == ["The first sentence here.", "A second sentence is it."]


def test_principal_components_keep_the_distances():
    """Vectors that span few dimensions lose nothing."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 4, generator=generator) @ torch.randn(4, 50, generator=generator)
    components = other_data.principal(rows)
    assert components.shape == (200, other_data.WIDTH)
    ratio = torch.pdist(rows) / torch.pdist(components)
    torch.testing.assert_close(ratio, ratio[0].expand_as(ratio), rtol=1e-3, atol=0)
    assert float(components.square().mean()) == pytest.approx(1)
