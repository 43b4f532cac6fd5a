"""Settings on resume: each is applied from there on or refused by name, and what is recorded is true."""

import dataclasses
import json
import logging
import shutil
from copy import deepcopy

import pytest
import torch
from accelerate import PartialState

from hub_cards.tokenizer_card import public_settings
from tests.training.loop.test_checkpoints import equal, everything
from training.data.codes import TokenDataConfig
from training.data.images import ImageDataConfig
from training.data.recordings import AudioDataConfig
from training.loop.batches import Progress
from training.loop.checkpoint_files import MANIFEST, seal
from training.loop.checkpoints import CheckpointError, list_checkpoints
from training.loop.resume_rules import APPLIED, FIXED, VALIDATION, changed_settings, refusals
from training.loop.run_record import RunRecord
from training.loop.settings import LoopSettings
from training.loop.trainer import Trainer
from training.recipes.audio import AudioLoopSettings, AudioLossSettings, AudioModelSettings
from training.recipes.drawn_samples import SampleSettings
from training.recipes.generator import GeneratorLoopSettings, GeneratorModelSettings
from training.recipes.image import ImageLossSettings, ImageModelSettings
from training.recipes.tokenizer import TokenizerLoopSettings
from training.runtime.settings import build_settings

GROUPS = {
    "data": ImageDataConfig,
    "model": ImageModelSettings,
    "loss": ImageLossSettings,
    "loop": TokenizerLoopSettings,
}
ALL = (
    *GROUPS.values(),
    *(AudioDataConfig, AudioModelSettings, AudioLossSettings, AudioLoopSettings),
    *(TokenDataConfig, GeneratorModelSettings, SampleSettings, GeneratorLoopSettings),
)
NAMES = sorted({spec.name for group in ALL for spec in dataclasses.fields(group)})


def test_every_setting_is_applied_or_refused():
    assert APPLIED.isdisjoint(FIXED)
    assert {*APPLIED, *FIXED} == set(NAMES), (
        "decide in training/loop/resume_rules.py what a resume does"
    )
    assert VALIDATION <= APPLIED


@pytest.mark.parametrize("name", sorted(FIXED))
def test_what_is_fixed_is_refused_by_name_with_both_values(name):
    changed = changed_settings({name: 7}, {name: 3})
    (line,) = refusals(changed, step=5)
    assert line.startswith(f"{name} was 7 and is now 3 (") and line.endswith(f"set {name}=7")
    assert changed_settings({name: 7}, {name: 7}) == {}


def test_the_autoencoder_phase_may_be_moved_while_the_run_is_in_it():
    def refused(old, new, step):
        return bool(refusals({"autoencoder_steps": (old, new)}, step))

    assert not refused(100, 200, 60) and not refused(100, 60, 60)
    assert refused(100, 50, 60) and refused(100, 200, 150) and refused(0, 200, 60)


@pytest.fixture
def run(make_trainer, monkeypatch, tmp_path):
    """Trains the tiny recipe with its settings recorded, as the command does; returns trainer and record."""

    def train(recipe: dict | None = None, **settings):
        values = {"output_dir": str(tmp_path / "run"), "tracker": "none", "batch_size": 4}
        values |= {"dataset": "photos", "perceptual": "none", "max_steps": 2} | settings
        record = RunRecord(build_settings(GROUPS, values))
        names = {spec.name for spec in dataclasses.fields(TokenizerLoopSettings)}
        loop = {name: value for name, value in values.items() if name in names}
        begin = Trainer.__init__
        with monkeypatch.context() as patched:
            patched.setattr(
                Trainer, "__init__", lambda self, *args: begin(self, *args, record=record)
            )
            trainer = make_trainer({"validation": 0} | (recipe or {}), **loop)
        trainer.train()
        return trainer, record

    return train


@pytest.mark.slow
def test_rates_betas_and_decay_are_applied_and_recorded(run, tmp_path):
    run(learning_rate=1e-3, weight_decay=0.1, ema_decay=0.9)
    changes = {"learning_rate": 1e-5, "adam_betas": [0.1, 0.2], "weight_decay": 0.0}
    changes |= {"max_steps": 4, "ema_decay": 0.5, "max_grad_norm": 1.0, "warmup_steps": 10}
    trainer, record = run(resume="latest", **changes)
    for scheduler, optimizer in zip(
        trainer.schedulers, trainer.stepper.optimizers.values(), strict=True
    ):
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(1e-5 * 4 / 10) and group["initial_lr"] == 1e-5
            assert group["betas"] == (0.1, 0.2) and group["weight_decay"] == 0.0
        assert scheduler.get_last_lr() == [group["lr"] for group in optimizer.param_groups]
    # The checkpoint, settings.json and what a card shows all know both values and the step.
    newest = list_checkpoints(tmp_path / "run")[-1]
    (change,) = json.loads((newest / "settings.json").read_text())["changes"]
    assert change == {"step": 2} | {
        **{"learning_rate": [1e-3, 1e-5], "weight_decay": [0.1, 0.0], "max_steps": [2, 4]},
        **{"adam_betas": [[0.5, 0.9], [0.1, 0.2]], "ema_decay": [0.9, 0.5]},
        **{"max_grad_norm": [None, 1.0], "warmup_steps": [0, 10]},
    }
    for name in ("settings.json", "model/training_settings.json"):
        shown = json.loads((tmp_path / "run" / name).read_text())
        assert shown["changes"] == [change] and shown["learning_rate"] == 1e-5
    # And the way back, decay and all; an unchanged resume adds nothing.
    trainer, record = run(resume="latest", **(changes | {"weight_decay": 0.1, "max_steps": 5}))
    decays = [g["weight_decay"] for g in trainer.stepper.optimizers["generator"].param_groups]
    assert decays == [0.1, 0.0] and [c["step"] for c in record.changes] == [2, 4]


@pytest.mark.slow
def test_going_back_forgets_the_changes_that_came_later(run, tmp_path):
    run(max_steps=1)
    run(max_steps=2, learning_rate=1e-5, resume="latest")
    first = list_checkpoints(tmp_path / "run")[0]
    _, record = run(max_steps=2, learning_rate=1e-3, resume=str(first))
    assert record.changes == [
        {"step": 1, "max_steps": [1, 2], "learning_rate": [1e-4, 1e-3]},
    ]


def test_other_codes_are_refused_in_one_line_and_nothing_is_touched(run, tmp_path):
    run()
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(CheckpointError) as caught:
        run(resume="latest", codebook_size=128, discriminator_channels=16)
    message = str(caught.value)
    assert "codebook_size was 1024 and is now 128" in message and "\n" not in message
    assert "set codebook_size=1024; discriminator_channels was 64 and is now 16" in message
    after = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert before == after


def test_models_that_differ_although_no_setting_does_are_refused_by_tensor(make_trainer):
    """Sizes may come from the tokenizer or from the classes of the data."""
    make_trainer({"validation": 0}, max_steps=1).train()
    trainer = make_trainer({"validation": 0}, max_steps=2, resume="latest")
    trainer.recipe.model.quantizer.projection = torch.nn.Linear(16, 8)
    with pytest.raises(
        CheckpointError, match=r"quantizer.projection.bias of SimVQImageModel is \(8,\)"
    ):
        trainer.train()


def test_other_classes_of_the_same_number_are_refused(tmp_path):
    record = RunRecord({"loop": LoopSettings()})
    record.config = {"id2label": {0: "cat", 1: "dog"}}
    record.write_checkpoint(tmp_path)
    record.resume(tmp_path, 3)
    record.config = {"id2label": {0: "cat", 1: "tench"}}
    with pytest.raises(ValueError, match="its classes are cat, tench"):
        record.resume(tmp_path, 3)


@pytest.mark.slow
def test_a_perceptual_network_may_come_later(make_trainer, tmp_path, monkeypatch):
    """Its constants are buffers beside the running means, and belong to no checkpoint."""
    recipe = {"lecam_weight": 0.1, "validation": 0}
    make_trainer(recipe, max_steps=1).train()

    class Distance(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("shift", torch.full((3,), 5.0))

        def forward(self, first, second):
            return (first - second).square().mean(dim=(1, 2, 3), keepdim=True)

    trainer = make_trainer(recipe, max_steps=2, resume="latest")
    trainer.recipe.loss.perceptual = Distance()
    keeper = type(trainer.buffers)([*trainer.recipe.modules.values(), trainer.recipe.loss])
    trainer.buffers = trainer.store.per_rank["buffers"] = keeper
    trainer.train()
    assert trainer.recipe.loss.lecam_real != 0
    assert trainer.recipe.loss.perceptual.shift.tolist() == [5.0] * 3


@pytest.mark.slow
def test_mixed_precision_may_change(make_trainer):
    """With and without gradient scaler, which fp16 has."""
    fp16 = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step, scaler in enumerate((None, fp16, None), 1):
        trainer = make_trainer(
            {"validation": 0},
            scaler=scaler,
            mixed_precision="fp16" if scaler else "no",
            max_steps=step,
            resume="latest",
            keep_checkpoints=1,
        )
        trainer.train()
        assert trainer.progress.step == step and trainer.accelerator.scaler is scaler


@pytest.mark.slow
def test_a_checkpoint_of_an_earlier_version_resumes_bit_for_bit(make_trainer, tmp_path):
    """One group of parameters, no settings beside the weights, no names of buffers."""
    trainer = make_trainer({"validation": 0}, max_steps=3, save_every=2)
    trainer.train()
    expected = deepcopy(everything(trainer))
    newest, last = list_checkpoints(tmp_path / "run")
    shutil.rmtree(last)
    for number, (name, optimizer) in enumerate(trainer.stepper.optimizers.items()):
        path = newest / f"optimizer{f'_{number}' if number else ''}.bin"
        state = torch.load(path, weights_only=True)
        module = trainer.recipe.modules[name]
        ordered = [p for group in optimizer.param_groups for p in group["params"]]
        new = {id(p): index for index, p in enumerate(ordered)}
        trained = [p for p in module.parameters() if p.requires_grad]
        state["state"] = {old: state["state"][new[id(p)]] for old, p in enumerate(trained)}
        group = state["param_groups"][0] | {"params": list(range(len(trained)))}
        torch.save(state | {"param_groups": [group]}, path)
    own = torch.load(newest / "rank_state_0.pt", weights_only=True)
    del own["buffers"]["names"]
    torch.save(own, newest / "rank_state_0.pt")
    (newest / MANIFEST).unlink()
    seal(newest)
    resumed = make_trainer({"validation": 0}, max_steps=3, resume="latest")
    resumed.train()
    assert equal(everything(resumed), expected)


def test_changes_are_public_without_paths():
    changes = [
        {"step": 3, "dataset": ["/home/me/a", "owner/name"], "output_dir": ["a", "b"]},
        {"step": 5, "num_workers": [1, 2]},
        *({"step": 7, "learning_rate": "?"}, "nonsense"),
    ]
    shown = public_settings({"changes": changes})
    assert shown == {"changes": [{"step": 3, "dataset": ["(local files)", "owner/name"]}]}


@pytest.mark.parametrize(
    "content", ["", "[]", "{", "[" * 9999, '{"changes": 3}', '{"changes": [{"step": "x"}]}']
)
def test_records_that_cannot_be_read_are_no_crash(tmp_path, content):
    folder = tmp_path / "run" / "checkpoints" / "step-00000003"
    folder.mkdir(parents=True)
    (folder / "settings.json").write_text(content)
    (tmp_path / "run" / "settings.json").write_text(content)
    record = RunRecord({"loop": LoopSettings()})
    record.resume(folder, 3)
    assert record.changes == []


def test_a_checkpoint_of_another_order_is_told(caplog, one_process):
    """Earlier versions shuffled in another way: the place is the same, the samples there are others."""
    PartialState(cpu=True)  # Accelerate's loggers ask it
    progress = Progress()
    now = {"seed": 0, "batch_size": 4, "processes": 1, "gradient_accumulation_steps": 1, "order": 2}
    state = progress.state_dict() | {"batches": 6}
    state["layout"] = {name: value for name, value in now.items() if name != "order"}
    progress.layout = now
    with caplog.at_level(logging.WARNING):
        progress.load_state_dict(state)
    assert "order None -> 2" in caplog.text and progress.batches == 6
