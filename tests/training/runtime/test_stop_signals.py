"""Signals: noted once, kept from workers, and a validation that they cut off comes after the resume."""

import os
import signal
import subprocess
import time
from types import SimpleNamespace

import pytest

from tests.training.loop.test_checkpoints import equal, everything
from training.loop.checkpoints import list_checkpoints
from training.loop.settings import LoopSettings
from training.recipes import run as launch
from training.runtime.stop_signals import Stopped, StopRequest, deaf_to_signals, shield_worker


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_noted_and_handlers_come_back(number, capfd):
    former = signal.getsignal(number)
    with StopRequest(SimpleNamespace(num_processes=1)) as stop:
        assert stop.received() == 0
        os.kill(os.getpid(), number)
        assert stop.received() == number
        if number == signal.SIGINT:
            with pytest.raises(KeyboardInterrupt):  # whoever asks twice does not want to wait
                os.kill(os.getpid(), number)
                time.sleep(1)
    assert signal.getsignal(number) == former
    assert f"{number.name}: finishing the step" in capfd.readouterr().err


def test_an_interrupt_outside_the_training_is_one_line(monkeypatch, caplog):
    """While data are opened, or the second one while a step is finished."""

    def interrupted(settings, *args):
        with deaf_to_signals():
            os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)

    monkeypatch.setattr(launch, "train", interrupted)
    monkeypatch.setattr(launch, "ignore_signals", lambda: None)
    monkeypatch.setattr("sys.argv", ["train.py", "tracker=none"])
    with caplog.at_level("INFO"), pytest.raises(SystemExit) as end:
        launch.run({"loop": LoopSettings}, lambda: None, "")
    assert end.value.code == 130 and "interrupted: resume=latest" in caplog.text


@pytest.mark.slow
def test_a_worker_ends_for_its_parent_and_for_nobody_else():
    worker = os.fork()
    if worker == 0:
        try:
            shield_worker(0)
            os.write(1, b"ready\n")
            time.sleep(60)
        finally:
            os._exit(1)
    time.sleep(0.2)
    for name in ("INT", "USR1", "TERM"):
        subprocess.run(["kill", f"-{name}", str(worker)], check=True)
    time.sleep(0.2)
    assert os.waitpid(worker, os.WNOHANG) == (0, 0)
    os.kill(worker, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == 0


@pytest.mark.slow
def test_a_validation_that_a_signal_cut_off_comes_after_the_resume(
    make_trainer, tmp_path, monkeypatch
):
    settings = {"max_steps": 4, "validate_every": 2, "save_every": 100}
    whole = make_trainer(output_dir=str(tmp_path / "whole"), **settings)
    whole.train()
    trainer = make_trainer(**settings)
    with monkeypatch.context() as patched:
        patched.setattr(
            StopRequest, "received", lambda self: signal.SIGUSR1 * (trainer.progress.step == 2)
        )
        with pytest.raises(Stopped, match="stopped at step 2 of 4: resume=latest") as stopped:
            trainer.train()
    assert stopped.value.status == 75
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-00000002"]
    assert not (tmp_path / "run" / "figures.jsonl").exists()
    resumed = make_trainer(resume="latest", **settings)
    resumed.train()
    assert equal(everything(resumed), everything(whole))
    lines, expected = (tmp_path / name / "figures.jsonl" for name in ("run", "whole"))
    assert lines.read_text() == expected.read_text()
