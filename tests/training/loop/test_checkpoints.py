"""Checkpoints: what they hold, damaged ones, hostile ones, full disks, and who may write among whose."""

import errno
import json
import os
import pickle
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch

from training.loop.checkpoint_files import MANIFEST, DamagedCheckpoint, load_tensors, seal, verify
from training.loop.checkpoints import CheckpointError, list_checkpoints


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def equal(first, second) -> bool:
    """Whether two states are the same, to the bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(equal, first, second))
    return first == second


def everything(trainer) -> dict:
    """All that training changes."""
    modules = trainer.recipe.modules | {"average": trainer.ema, "loss": trainer.recipe.loss}
    state = {name: module.state_dict() for name, module in modules.items()}
    state |= {f"{n} optimizer": o.state_dict() for n, o in trainer.stepper.optimizers.items()}
    return state | {"rates": [s.state_dict() for s in trainer.schedulers]}


@pytest.mark.slow
@pytest.mark.parametrize(
    "phase",
    [
        pytest.param({"autoencoder_steps": 2}, id="after the phase", marks=pytest.mark.soak),
        pytest.param(
            {"autoencoder_steps": 6, "codes_from_latents": True}, id="while latents are collected"
        ),
    ],
)
def test_resume_goes_on_bit_for_bit_in_the_middle_of_a_window(
    make_trainer, tmp_path, monkeypatch, phase
):
    """Also of an epoch, between two reports, with LeCAM's means in the loss."""
    settings = {"epochs": 9, "save_every": 100, "log_every": 4, "validate_every": 4}
    settings |= {"gradient_accumulation_steps": 2, "warmup_steps": 4} | phase
    recipe = {"count": 24, "lecam_weight": 0.1}

    def run(folder: str, **more):
        trainer = make_trainer(recipe, output_dir=str(tmp_path / folder), **(settings | more))
        logged = []
        monkeypatch.setattr(
            trainer.accelerator, "log", lambda values, step: logged.append((step, dict(values)))
        )
        trainer.train()
        for _, values in logged:
            for name in ("run/steps_per_second", "run/data_wait"):
                values.pop(name, None)
        return trainer, logged

    whole, expected = run("whole", max_steps=9)
    run("parts", max_steps=5)
    resumed, logged = run("parts", max_steps=9, resume="latest")
    assert equal(everything(resumed), everything(whole))
    # Step 5 was the last of the first part, which reports and validates then; the window begins again.
    steps = {step for step, _ in logged}
    assert steps == {8, 9}
    assert [values for step, values in logged if step == 9] == [
        values for step, values in expected if step == 9
    ]
    lines = (tmp_path / "parts" / "figures.jsonl").read_text().splitlines()
    wanted = (tmp_path / "whole" / "figures.jsonl").read_text().splitlines()
    assert [line for line in lines if json.loads(line)["step"] != 5] == wanted


@pytest.mark.slow
def test_a_checkpoint_holds_the_window_of_figures(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=3, log_every=100, save_every=2)
    kept = {}
    save = trainer.store.save

    def saving(step):
        kept[step] = (
            trainer.reports.means.state_dict()["sums"] | {},
            trainer.stepper.watch.counter.counts + 0,
        )
        save(step)

    trainer.store.save = saving
    trainer.train()
    again = make_trainer(max_steps=3, log_every=100, resume="latest")
    shutil.rmtree(list_checkpoints(tmp_path / "run")[-1])
    again.store.start("latest")
    sums, counts = kept[2]
    assert again.progress.step == 2 and sums and counts.sum() == 2 * 4 * 256
    assert equal(again.reports.means.state_dict()["sums"], sums)
    assert torch.equal(again.stepper.watch.counter.counts, counts)
    assert again.progress.figures is None


def test_resume_from_nothing_and_from_a_wrong_place(make_trainer):
    make_trainer(max_steps=1, resume="latest").train()
    with pytest.raises(CheckpointError, match="no-such-folder"):
        make_trainer(max_steps=1, resume="no-such-folder").train()


def test_a_new_run_does_not_write_among_anothers_checkpoints(make_trainer, tmp_path):
    make_trainer(max_steps=1).train()
    with pytest.raises(CheckpointError, match="up to step 1: set resume=latest"):
        make_trainer(max_steps=1).train()
    assert names(tmp_path / "run") == ["step-00000001"]


@pytest.fixture
def sealed(tmp_path) -> Path:
    folder = tmp_path / "step-00000001"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 4)
    torch.save({"a": torch.arange(3)}, folder / "run_state.pt")
    seal(folder)
    verify(folder)
    return folder


def _flip(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[500] ^= 1
    (folder / "model.safetensors").write_bytes(content)


def _link(folder: Path) -> None:
    elsewhere = folder.with_name("elsewhere")
    os.replace(folder / "model.safetensors", elsewhere)
    (folder / "model.safetensors").symlink_to(elsewhere)


def _escape(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"]["../outside"] = {"bytes": 0, "sha256": ""}
    (folder / MANIFEST).write_text(json.dumps(manifest))


DAMAGES = {
    "1 bytes instead of 1,024": lambda f: (f / "model.safetensors").write_bytes(b"x"),
    "other content": _flip,
    "model.safetensors is missing": lambda f: (f / "model.safetensors").unlink(),
    "more.bin is not in the manifest": lambda f: (f / "more.bin").write_bytes(b"x"),
    "manifest.json is missing": lambda f: (f / MANIFEST).unlink(),
    "no plain file": _link,
    "../outside is missing": _escape,
    "manifest.json cannot be read": lambda f: (f / MANIFEST).write_text('{"files": {"a": 3}}'),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_damage_is_found_and_named(sealed, message):
    DAMAGES[message](sealed)
    with pytest.raises(DamagedCheckpoint, match=message.replace(".", r"\.")):
        verify(sealed)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"files": []}', b"\xff" * 9, b"[" * 10**5, b" " * (1 << 21)]
)
def test_a_broken_manifest_is_no_crash(sealed, content):
    (sealed / MANIFEST).write_bytes(content)
    with pytest.raises(DamagedCheckpoint, match=MANIFEST):
        verify(sealed)


@pytest.mark.slow
def test_a_damaged_newest_gives_way_to_the_one_before(make_trainer, tmp_path, caplog):
    run = tmp_path / "run"
    make_trainer(max_steps=4, save_every=2).train()
    (run / "checkpoints" / ".partial-step-00000006").mkdir()  # a killed run's
    first, newest = list_checkpoints(run)
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="step-00000004 is damaged: model.safetensors"):
        make_trainer(max_steps=5, resume=str(newest)).train()
    # With room for one checkpoint only, the whole one must not make way for the damaged one.
    trainer = make_trainer(max_steps=3, resume="latest", keep_checkpoints=1)
    with caplog.at_level("WARNING"):
        trainer.store.start("latest")
    assert f"{newest} is damaged" in caplog.text and f"going on from {first}" in caplog.text
    assert names(run) == ["aside-step-00000004", "step-00000002"]
    trainer.progress.step = 3
    trainer.store.save(3)
    assert names(run) == ["aside-step-00000004", "step-00000003"]
    (run / "checkpoints" / "step-00000003" / "run_state.pt").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint is whole.*run_state.pt is missing"):
        make_trainer(max_steps=5, resume="latest").train()


@pytest.mark.slow
def test_going_back_sets_the_newer_ones_aside(make_trainer, tmp_path):
    run = tmp_path / "run"
    make_trainer(max_steps=4, save_every=2, validate_every=2).train()
    first, _ = list_checkpoints(run)
    make_trainer(max_steps=3, resume=str(first), keep_checkpoints=2).train()
    assert names(run) == ["aside-step-00000004", "step-00000002", "step-00000003"]
    lines = [json.loads(line) for line in (run / "figures.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3]


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self):
        return os.system, (f"touch {self.proof}",)


HOSTILE = (
    "run_state.pt",
    "rank_state_0.pt",
    "random_states_0.pkl",
    "optimizer.bin",
    "optimizer_1.bin",
    "pytorch_model.bin",
    "model.safetensors",
    "custom_checkpoint_0.pkl",
    "pytorch_model_fsdp_0/.metadata",
)


@pytest.mark.slow
def test_no_file_of_a_checkpoint_can_run_code(make_trainer, tmp_path):
    """As a plain pickle and in torch's own format, under a manifest that fits."""
    make_trainer(max_steps=1).train()
    (good,) = list_checkpoints(tmp_path / "run")
    trainer = make_trainer(max_steps=1)
    assert {path.name for path in good.iterdir()} == {
        *HOSTILE[:5],
        *("model.safetensors", "model_1.safetensors", MANIFEST),
    }
    proof = tmp_path / "proof"
    for name in HOSTILE:
        for plain in (True, False)[: 1 if ".metadata" in name else 2]:  # torch's writer refuses it
            bad = tmp_path / "bad"
            shutil.rmtree(bad, ignore_errors=True)
            shutil.copytree(good, bad)
            (bad / MANIFEST).unlink()
            (bad / name).parent.mkdir(exist_ok=True)
            if plain:
                (bad / name).write_bytes(pickle.dumps({"progress": Bomb(proof)}))
            else:
                torch.save({"progress": Bomb(proof)}, bad / name)
            if name == "pytorch_model.bin":
                (bad / "model.safetensors").unlink()
            seal(bad)
            with pytest.raises(CheckpointError, match="cannot load the checkpoint"):
                trainer.store.start(str(bad))
            assert not proof.exists(), name
    # The proof that a bomb is one.
    with pytest.raises(DamagedCheckpoint, match="cannot be loaded safely"):
        load_tensors(bad / name)
    pickle.loads((bad / name).read_bytes())
    assert proof.exists()


def test_a_full_disk_ends_the_run_and_nothing_else(make_trainer, tmp_path, monkeypatch):
    run = tmp_path / "run"
    trainer = make_trainer(max_steps=9, save_every=2)
    trainer.progress.step = 2
    trainer.store.save(2)
    before = {p: p.read_bytes() for p in list_checkpoints(run)[0].iterdir()}

    def fails(step: int, reason: str) -> None:
        with pytest.raises(CheckpointError) as caught:
            trainer.store.save(step)
        message = str(caught.value)
        assert str(run / "checkpoints" / f"step-{step:08d}") in message and reason in message
        assert re.search(r"of about \d+\.\d MB", message)
        assert names(run) == ["step-00000002"]
        assert before == {p: p.read_bytes() for p in list_checkpoints(run)[0].iterdir()}

    # Files may not grow beyond so many bytes: writing fails in the middle, in one writer after the other.
    largest = max(map(len, before.values()))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (100, 10_000, largest // 2, largest - 1):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            fails(4, "")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    for place in ("torch.save", "training.loop.checkpoints.seal", "os.replace"):
        with monkeypatch.context() as patched:
            full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            patched.setattr(place, lambda *args, error=full, **more: (_ for _ in ()).throw(error))
            fails(4, "No space left on device")
    with monkeypatch.context() as patched:
        usage = shutil.disk_usage(run)._replace(free=1_000_000)
        patched.setattr(shutil, "disk_usage", lambda path: usage)
        fails(4, "the disk has 1.0 MB left")
    trainer.store.save(4)  # once there is room
    assert names(run) == ["step-00000002", "step-00000004"]


@pytest.mark.slow
def test_another_batch_size_goes_on_at_the_same_place(make_trainer, tmp_path, caplog):
    make_trainer({"batch_size": 4}, max_steps=2, batch_size=4).train()
    trainer = make_trainer({"batch_size": 2}, max_steps=4, batch_size=2, resume="latest")
    with caplog.at_level("WARNING"):
        trainer.train()
    assert "batch_size 4 -> 2" in caplog.text
    assert trainer.progress.batches == 2 * 2 + 2
