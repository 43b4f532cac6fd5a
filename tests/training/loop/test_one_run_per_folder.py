"""A command refuses a folder that another one is writing to, and touches nothing there."""

import re
from pathlib import Path

import pytest

from tests.support.programs import REPOSITORY, TWO_RANKS, launch
from tests.training.support.generator_runs import TINY, train_here, write_picture_codes
from training.demo.launcher import clear_run
from training.experiments import runs
from training.experiments.tasks import TASKS, Task
from training.loop.checkpoints import list_checkpoints
from training.runtime.folder_lock import hold_folder
from training.runtime.settings import SettingsError

BUSY = r"output_dir: process \d+ on .* is writing to .*run: wait until it ends, stop it, or choose another"


@pytest.fixture(scope="module")
def codes(tmp_path_factory) -> Path:
    return write_picture_codes(tmp_path_factory.mktemp("codes"))


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.slow
def test_a_second_run_is_refused_new_or_resumed(codes, tmp_path):
    run = tmp_path / "run"
    train_here(codes, run, max_steps=2)
    # What the first run may be writing at this moment.
    for partial in ("checkpoints/.partial-step-00000004", ".partial-models"):
        (run / partial).mkdir()
        (run / partial / "model.safetensors").write_text("half")
    with hold_folder(run):
        before = contents(run)
        for resume in (None, "latest", str(list_checkpoints(run)[-1])):
            with pytest.raises(SettingsError, match=BUSY):
                train_here(codes, run, max_steps=4, resume=resume, learning_rate=1e-5)
        assert contents(run) == before
    train_here(codes, run, max_steps=4, resume="latest")
    assert [path.name for path in list_checkpoints(run)][-1] == "step-00000004"
    assert not [name for name in contents(run) if ".partial" in name or ".lock" in name]


def test_a_run_that_failed_frees_its_folder(tmp_path):
    for _ in range(2):
        with pytest.raises((ValueError, OSError), match="none"):
            train_here(tmp_path / "none", tmp_path / "run", max_steps=2)
    assert not (tmp_path / "run" / ".lock").exists()


@pytest.mark.soak
@pytest.mark.slow
def test_two_ranks_are_refused_by_one_line_each(codes, tmp_path):
    run = tmp_path / "run"
    words = [f"{name}={value}" for name, value in TINY.items()]
    words += [f"dataset={codes}", f"output_dir={run}", "max_steps=2"]
    script = str(REPOSITORY / "training" / "train_generator.py")
    with hold_folder(run):
        done = launch(script, *words, launcher=TWO_RANKS)
    assert done.returncode == 1
    assert 1 <= len(re.findall(f"error: {BUSY}", done.stderr)) <= 2, done.stderr
    assert list(run.iterdir()) == []
    done = launch(script, *words, launcher=TWO_RANKS)
    assert done.returncode == 0, done.stderr
    assert (run / "finished.json").is_file() and not (run / ".lock").exists()


def test_experiments_and_demos_delete_no_run_that_is_under_way(tmp_path, monkeypatch):
    run = tmp_path / "run"
    task = Task({}, "", lambda settings: pytest.fail("it trains"))
    monkeypatch.setitem(TASKS, "images", task)
    with hold_folder(run):
        (run / "settings.json").write_text("{}")
        found = runs._run({"output_dir": str(run), "dataset": "pictures"}, "images")
        assert re.search(BUSY, found["error"])
        with pytest.raises(SystemExit, match=BUSY):
            clear_run(run)
        assert (run / "settings.json").is_file()
    clear_run(run)
    assert not run.exists()
