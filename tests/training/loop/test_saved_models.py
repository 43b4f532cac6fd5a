"""model/ and best_model/: there from the first save on, never half, never in the place of what others wrote."""

import json
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import save_file

from modeling_simvq import SimVQImageModel
from training.export_checkpoint import export_checkpoint
from training.loop import saved_models
from training.loop.checkpoint_files import DamagedCheckpoint, let_others_read
from training.loop.checkpoints import list_checkpoints
from training.loop.saved_models import BEST, MODEL, PIPELINE, ModelFolders
from training.runtime import stop_signals
from training.runtime.settings import SettingsError
from training.runtime.stop_signals import Stopped, StopRequest


class OneProcess:
    num_processes, is_main_process = 1, True


class Numbers:
    """A recipe whose model is a number, with or without a pipeline beside it."""

    headline = ("loss", -1)

    def __init__(self, pipeline: bool = False):
        self.pipeline = pipeline

    def save(self, model: int, folder: Path) -> Path:
        for path in (folder, folder.with_name("pipeline"))[: 1 + self.pipeline]:
            path.mkdir()
            (path / "weights").write_text(str(model))
        return path


def folders(run: Path, step: int = 0, resumed: bool = False, **recipe) -> ModelFolders:
    PartialState()  # the logs ask it for the rank
    found = ModelFolders(Numbers(**recipe), run, OneProcess(), None)
    found.start(step, resumed=resumed, ends=False)
    return found


def listed(run: Path) -> dict[str, str]:
    return {path.parent.name: path.read_text() for path in sorted(run.rglob("weights"))}


def test_the_newest_and_the_best(tmp_path):
    models = folders(tmp_path)
    for step, loss in ((1, 3.0), (2, 2.0), (3, float("nan")), (4, 2.5)):
        if models.is_best({"loss": loss}):
            models.save(BEST, step, step, {"loss": loss})
        models.save(MODEL, step, step, {"loss": loss})
    assert listed(tmp_path) == {"best_model": "2", "model": "4"}
    assert json.loads((tmp_path / BEST / "saved_at.json").read_text()) == {"step": 2, "loss": 2.0}
    # A resume knows them.
    models = folders(tmp_path, step=4, resumed=True)
    assert models.step_of(MODEL) == 4
    assert not models.is_best({"loss": 2.0}) and models.is_best({"loss": 1.9})
    assert not models.is_best({}) and not models.is_best({"loss": "low"})
    assert folders(tmp_path, step=3, resumed=True).step_of(MODEL) is None


def test_a_pipeline_goes_with_its_generator(tmp_path):
    models = folders(tmp_path, pipeline=True)
    models.save(BEST, 1, 1, {"loss": 1.0})
    models.save(MODEL, 2, 2, None)
    assert listed(tmp_path) == {
        **{"best_model": "1", "best_pipeline": "1"},
        **{"model": "2", "pipeline": "2"},
    }
    assert models.published == tmp_path / PIPELINE


@pytest.mark.parametrize("place", ["save", "flush", "first rename", "second rename"])
def test_a_kill_at_any_moment_leaves_a_whole_model(tmp_path, monkeypatch, place):
    """A kill is an error that nobody handles: what is on the disk then is what a resume finds."""
    folders(tmp_path).save(MODEL, 1, 1, None)
    models, killed = folders(tmp_path, step=1, resumed=True), KeyboardInterrupt
    calls = {"number": 0}

    def dies(*args):
        raise killed

    def replace(old, new, real=saved_models.os.replace):
        if Path(new).name.startswith(".") or Path(old).name == MODEL or Path(new).name == MODEL:
            calls["number"] += 1
            if calls["number"] == {"first rename": 1, "second rename": 2}[place]:
                raise killed
        real(old, new)

    with monkeypatch.context() as patched:
        if place == "save":
            patched.setattr(Numbers, "save", dies)
        elif place == "flush":
            patched.setattr(saved_models, "flush_to_disk", dies)
        else:
            patched.setattr(saved_models, "os", SimpleNamespace(replace=replace))
        patched.setattr(saved_models.shutil, "rmtree", lambda *args, **more: None)
        with pytest.raises(killed):
            models.save(MODEL, 2, 2, None)
    folders(tmp_path, step=1, resumed=True)
    assert listed(tmp_path) == {"model": "1"}


def test_a_full_disk_costs_a_model_but_not_the_run(tmp_path, monkeypatch, caplog):
    models = folders(tmp_path)
    models.save(MODEL, 1, 1, None)

    def full(self, model, folder):
        folder.mkdir()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Numbers, "save", full)
    models.save(MODEL, 2, 2, None)
    assert "No space left" in caplog.text and "training continues" in caplog.text
    assert listed(tmp_path) == {"model": "1"} and models.step_of(MODEL) == 1
    with pytest.raises(OSError, match="cannot write to .*model: No space left"):
        models.save(MODEL, 2, 2, None, last=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_others_wrote_into_a_model_is_kept(tmp_path):
    models = folders(tmp_path)
    models.save(MODEL, 1, 1, None)
    later = (tmp_path / MODEL / "saved_at.json").stat().st_mtime_ns + 10
    evaluation = tmp_path / MODEL / "evaluation.json"
    evaluation.write_text("{}")
    saved_models.os.utime(evaluation, ns=(later, later))
    models.save(MODEL, 2, 2, None)
    models.save(MODEL, 3, 3, None)
    assert listed(tmp_path) == {"aside-model-step-00000001": "1", "model": "3"}
    # A new run in the folder takes nothing away either.
    folders(tmp_path).save(MODEL, 9, 9, None)
    assert listed(tmp_path)["aside-model-step-00000003"] == "3"


@pytest.mark.parametrize("pipeline", [False, True])
def test_models_beyond_the_checkpoint_are_set_aside(tmp_path, caplog, pipeline):
    """Models of steps that a resume has abandoned are neither its best nor its newest."""
    models = folders(tmp_path, pipeline=pipeline)
    models.save(BEST, 4, 4, {"loss": 1.0})
    models.save(MODEL, 6, 6, {"loss": 2.0})
    models = folders(tmp_path, step=4, resumed=True, pipeline=pipeline)
    assert not models.is_best({"loss": 1.5}) and models.step_of(MODEL) is None
    kept = {"best_model": "4", "aside-model-step-00000006": "6"}
    more = {"best_pipeline": "4", "aside-pipeline-step-00000006": "6"} if pipeline else {}
    assert listed(tmp_path) == kept | more
    assert "model is of step 6, and the run continues from step 4: it is now aside-" in caplog.text
    models = folders(tmp_path, step=3, resumed=True, pipeline=pipeline)
    assert models.is_best({"loss": 1.5})
    assert "best_model" not in listed(tmp_path)
    assert listed(tmp_path)["aside-best_model-step-00000004"] == "4"


def test_the_best_on_other_data_is_set_aside_for_that_reason(tmp_path, caplog):
    models = folders(tmp_path)
    models.save(BEST, 1, 1, {"loss": 1.0})
    models.save(MODEL, 1, 1, {"loss": 1.0})
    changed = {"validation_split": ("validation", "test"), "learning_rate": (1, 2), "dataset": "ab"}
    record = SimpleNamespace(latest=changed, write=lambda folder: None)
    models = ModelFolders(Numbers(), tmp_path, OneProcess(), record)
    models.start(1, resumed=True, ends=False)
    assert listed(tmp_path) == {"aside-best_model-step-00000001": "1", "model": "1"}
    said = "best_model was the best on other validation data (dataset, validation_split changed)"
    assert said in caplog.text and "did not write" not in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("how", ["earlier", "damaged"])
def test_an_abandoned_branch_gives_no_best_model(make_trainer, tmp_path, how):
    run, settings = tmp_path / "run", {"validate_every": 2, "save_every": 2, "ema_decay": 0.1}
    make_trainer({"validation": 4}, max_steps=4, learning_rate=3e-3, **settings).train()
    first, last = list_checkpoints(run)
    assert json.loads((run / BEST / "saved_at.json").read_text())["step"] == 4
    if how == "damaged":
        (last / "run_state.pt").write_bytes(b"x")
    resume = "latest" if how == "damaged" else str(first)
    trainer = make_trainer(
        {"validation": 4}, max_steps=4, learning_rate=1e-6, resume=resume, **settings
    )
    trainer.train()
    figures = [json.loads(line) for line in (run / "figures.jsonl").read_text().splitlines()]
    best = json.loads((run / BEST / "saved_at.json").read_text())
    assert best["psnr"] in [line["psnr"] for line in figures]
    saved = SimVQImageModel.from_pretrained(run / BEST).state_dict()
    average = trainer.ema.module.state_dict()
    assert all(torch.equal(saved[name], average[name]) for name in average)
    asides = sorted(path.name for path in run.glob("aside-*"))
    assert asides == ["aside-best_model-step-00000004", "aside-model-step-00000004"]


def test_a_stopped_run_has_a_model_and_an_export_is_the_same(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer({"validation": 4}, max_steps=2, validate_every=1)
    with monkeypatch.context() as patched:
        patched.setattr(StopRequest, "received", lambda self: signal.SIGTERM)
        with pytest.raises(Stopped):
            trainer.train()
    run = tmp_path / "run"
    model = SimVQImageModel.from_pretrained(run / "model").state_dict()
    for name, tensor in trainer.ema.module.state_dict().items():
        assert torch.equal(model[name], tensor), name
    assert not (run / "best_model").exists()  # the validation of this step is still due
    (newest,) = list_checkpoints(run)
    # Without settings nothing tells what the model is; the run's model/ does, of earlier versions too.
    with pytest.raises(SettingsError, match="names no resolution"):
        export_checkpoint(newest, tmp_path / "exported")
    (run / "settings.json").write_text('{"resolution": 32, "dataset": "x"}')
    assert export_checkpoint(run, tmp_path / "exported") == tmp_path / "exported"
    exported = SimVQImageModel.from_pretrained(tmp_path / "exported").state_dict()
    assert all(torch.equal(model[name], exported[name]) for name in model)
    with pytest.raises(SettingsError, match="exists already"):
        export_checkpoint(run, tmp_path / "exported")
    (newest / "run_state.pt").write_bytes(b"x")
    with pytest.raises(DamagedCheckpoint, match="run_state.pt has 1 bytes"):
        export_checkpoint(run, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_the_end_of_a_process_takes_no_more_signals(monkeypatch):
    set_to = {}
    monkeypatch.setattr(
        stop_signals.signal, "signal", lambda n, handler: set_to.update({n: handler})
    )
    stop_signals.ignore_signals()
    assert set_to == dict.fromkeys(stop_signals._SIGNALS, signal.SIG_IGN)


def test_a_log_that_is_no_terminal_has_the_losses(make_trainer, caplog):
    trainer = make_trainer({"validation": 0}, max_steps=2, log_every=1)
    assert trainer.reports.plain_log
    with caplog.at_level("INFO"):
        trainer.train()
    said = [record.getMessage().removeprefix("[RANK 0] ") for record in caplog.records]
    lines = [line for line in said if line.startswith("step ")]
    assert len(lines) == 2 and lines[0].startswith("step 1 of 2: loss ")
    for word in ("reconstruction", "commitment", "discriminator", "hinge", "learning rate 0.0001"):
        assert word in lines[0]


def test_others_may_read_what_a_run_saves(tmp_path):
    """safetensors writes files that their owner alone can read."""
    (tmp_path / "below").mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "below/model.safetensors")
    (tmp_path / "ordinary").write_text("")
    let_others_read(tmp_path)
    modes = {path.stat().st_mode for path in tmp_path.rglob("*") if path.is_file()}
    assert modes == {(tmp_path / "ordinary").stat().st_mode}
