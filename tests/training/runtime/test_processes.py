"""Launches that were meant for more processes than work together are noticed."""

import os
import subprocess
import sys

import pytest
import yaml
from accelerate.utils import DistributedType

from tests.support.programs import CPU, PLAIN_LAUNCH, REPOSITORY
from training.runtime import processes
from training.runtime.processes import SIZE_VARIABLES, check_processes, refuse_sharding
from training.runtime.settings import SettingsError


class Alone:
    num_processes = 1
    distributed_type = DistributedType.NO


@pytest.fixture(autouse=True)
def plain_launch(monkeypatch, tmp_path):
    """As started by hand, without launcher and configuration."""
    from accelerate.commands.config import config_args

    for name in (*SIZE_VARIABLES, "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(processes, "_parent_command", lambda: ["bash"])
    monkeypatch.setattr(config_args, "default_config_file", str(tmp_path / "none.yaml"))


def test_one_process_that_is_meant_to_be_one(monkeypatch):
    check_processes(Alone())
    monkeypatch.setenv("WORLD_SIZE", "1")
    command = [
        "python",
        "/bin/accelerate",
        "launch",
        "--num_processes=1",
        "x.py",
        "--num_processes",
    ]
    monkeypatch.setattr(processes, "_parent_command", lambda: command)
    check_processes(Alone())
    monkeypatch.setattr(processes, "_parent_command", lambda: ["accelerate", "launch", "x.py"])
    check_processes(Alone())


def test_split_models_are_refused(monkeypatch):
    monkeypatch.setattr(Alone, "distributed_type", DistributedType.FSDP, raising=False)
    with pytest.raises(SettingsError, match="FSDP.*eight_gpus.yaml"):
        refuse_sharding(Alone())


@pytest.mark.parametrize("name", SIZE_VARIABLES)
def test_a_launcher_that_started_more(monkeypatch, name):
    monkeypatch.setenv(name, "2")
    with pytest.raises(
        SettingsError, match=f"2 processes .{name}=2.*--multi_gpu.*ACCELERATE_USE_CPU"
    ):
        check_processes(Alone())


@pytest.mark.parametrize(
    "command",
    [
        ["python", "/venv/bin/accelerate", "launch", "--cpu", "--num_processes", "4", "train.py"],
        ["python", "/venv/bin/accelerate-launch", "--num-processes=4", "train.py", "x=1"],
        ["python", "-m", "accelerate.commands.launch", "--num_processes", "4", "train.py"],
        ["accelerate", "launch", "--config_file", "{file}", "train.py"],
        ["accelerate", "launch", "train.py", "config_file=other.yaml"],
    ],
)
def test_accelerate_that_started_one_of_four(monkeypatch, tmp_path, command):
    from accelerate.commands.config import config_args

    file = tmp_path / "launcher.yaml"
    file.write_text(yaml.safe_dump({"distributed_type": "MULTI_CPU", "num_processes": 4}))
    if not any("--num" in word or "{file}" in word for word in command):
        monkeypatch.setattr(config_args, "default_config_file", str(file))
    words = [word.format(file=file) for word in command]
    monkeypatch.setattr(processes, "_parent_command", lambda: words)
    with pytest.raises(SettingsError, match="meant for 4 processes"):
        check_processes(Alone())
    # Accelerate's own launcher of many sets LOCAL_RANK: a rank does not ask its parent.
    monkeypatch.setenv("LOCAL_RANK", "0")
    check_processes(Alone())


@pytest.mark.slow
def test_accelerate_launch_on_cpu_that_runs_one_of_two_ends_in_one_line(tmp_path):
    """The trap itself, as users type it."""
    script = REPOSITORY / "training" / "train_image.py"
    words = [f"output_dir={tmp_path / 'run'}", f"dataset={tmp_path}"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *PLAIN_LAUNCH, "--cpu"]
    command += ["--num_processes", "2", str(script), *words]
    done = subprocess.run(command, env=os.environ | CPU, capture_output=True, text=True)
    assert done.returncode == 1
    assert "error: the launch is meant for 2 processes (--num_processes 2)" in done.stderr
    assert not (tmp_path / "run").exists()
