"""What a launch says beside the settings is taken or refused by name; machines share folder and patience."""

import shutil
import socket
from datetime import timedelta

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from training.data.images import ImageDataConfig
from training.data.loader import SampleDataset
from training.data.reader import Decoder
from training.loop.settings import LoopSettings
from training.recipes.run import make_accelerator
from training.runtime import shared_folder
from training.runtime.launch_options import follow_launch
from training.runtime.processes import PATIENT, join_processes
from training.runtime.settings import SettingsError, build_settings
from training.runtime.shared_folder import check_shared
from training.runtime.worker_memory import check_shared_memory, worker_error


def loop(**values) -> LoopSettings:
    return build_settings({"loop": LoopSettings}, values)["loop"]


LAUNCHES = {
    "ACCELERATE_MIXED_PRECISION": ("bf16", "mixed_precision", "bf16", "no"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("4", "gradient_accumulation_steps", 4, 1),
    "ACCELERATE_GRADIENT_CLIPPING": ("1.5", "max_grad_norm", 1.5, None),
}


@pytest.mark.parametrize("variable", LAUNCHES)
def test_what_the_launch_says_is_taken_or_refused(monkeypatch, variable):
    said, name, value, default = LAUNCHES[variable]
    monkeypatch.setenv(variable, said)
    settings = loop()
    follow_launch(settings)
    assert getattr(settings, name) == value
    follow_launch(loop(**{name: value}))
    # A value that is chosen is no default, even if it is the same.
    with pytest.raises(
        SettingsError, match=f"^{name} is .*, but the launch says {said}.*{variable}"
    ):
        follow_launch(loop(**{name: default}))


@pytest.mark.slow
def test_the_accelerator_and_the_steps_agree_with_the_launch(make_trainer, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "BF16")
    trainer = make_trainer({"count": 16, "validation": 0}, epochs=1)
    assert trainer.settings.gradient_accumulation_steps == 2 and trainer.total_steps == 2
    assert trainer.accelerator.gradient_accumulation_steps == 2
    assert trainer.accelerator.mixed_precision == trainer.settings.mixed_precision == "bf16"
    with pytest.raises(
        SettingsError, match="gradient_accumulation_steps is 4, but the launch says 2"
    ):
        make_trainer(gradient_accumulation_steps=4)


@pytest.mark.parametrize(
    ("variable", "said", "message"),
    [
        ("ACCELERATE_MIXED_PRECISION", "fp8", "mixed_precision can be no, bf16 or fp16"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto", "can be a positive number"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "0", "can be a positive number"),
        ("ACCELERATE_GRADIENT_CLIPPING", "nan", "can be a positive number"),
        ("ACCELERATE_DYNAMO_BACKEND", "my_own", "--dynamo_backend my_own .*take inductor"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "True", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "parallelism"),
    ],
)
def test_what_is_not_done_here_is_refused_in_one_line(monkeypatch, variable, said, message):
    monkeypatch.setenv(variable, said)
    with pytest.raises(SettingsError, match=message) as caught:
        make_accelerator(loop())
    assert variable in str(caught.value) and "\n" not in str(caught.value)


def test_launchers_that_say_nothing(monkeypatch):
    for variable, said in (
        ("ACCELERATE_MIXED_PRECISION", "no"),
        ("ACCELERATE_DYNAMO_BACKEND", "NO"),
        ("ACCELERATE_GRADIENT_CLIPPING", "None"),
        ("ACCELERATE_USE_DEEPSPEED", "false"),
    ):
        monkeypatch.setenv(variable, said)
    settings = loop(mixed_precision="fp16")
    follow_launch(settings)
    assert settings.mixed_precision == "fp16" and settings.max_grad_norm is None


@pytest.mark.parametrize(
    ("variable", "said"),
    [("ACCELERATE_MIXED_PRECISION", "fp16"), ("ACCELERATE_DYNAMO_BACKEND", "eager")],
)
def test_commands_that_do_not_train_refuse_them_too(monkeypatch, variable, said):
    monkeypatch.setenv(variable, said)
    with pytest.raises(SettingsError, match=f"{said}.*{variable}"):
        join_processes()


def test_processes_wait_for_one_that_downloads(monkeypatch):
    assert PATIENT.timeout >= timedelta(hours=2)
    given = []
    begin = Accelerator.__init__
    monkeypatch.setattr(
        Accelerator, "__init__", lambda self, **kw: given.append(kw) or begin(self, **kw)
    )
    make_accelerator(loop(tracker="none"))
    join_processes()
    assert all(PATIENT in arguments["kwargs_handlers"] for arguments in given) and len(given) == 2


class Ranks:
    """Two processes, of which this is one."""

    num_processes = 2

    def __init__(self, rank: int):
        self.process_index, self.is_main_process = rank, rank == 0


@pytest.mark.slow
def test_a_folder_that_machines_do_not_share_is_found_at_the_start(monkeypatch, tmp_path):
    monkeypatch.setattr(shared_folder, "PATIENCE", 0.3)
    sent, answers = {}, []

    def broadcast(values):
        return sent.setdefault("values", list(values))

    monkeypatch.setattr(shared_folder, "broadcast_object_list", broadcast)
    monkeypatch.setattr(shared_folder, "gather_object", lambda own: [*answers, *own])
    check_shared(Ranks(0), tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []
    # The second sees a folder of the same name, without the first one's file in it.
    with pytest.raises(SettingsError, match="output_dir: process 1 on") as caught:
        check_shared(Ranks(1), tmp_path / "run")
    message = str(caught.value)
    assert socket.gethostname() in message and str(tmp_path / "run") in message
    assert not (tmp_path / "other").exists()
    # The first says the same when it hears of it.
    answers.append("process 1 on node2")
    with pytest.raises(SettingsError, match="process 1 on node2 does not see"):
        check_shared(Ranks(0), tmp_path / "run")
    token = sent["values"][0]
    (tmp_path / "run" / token).write_text(token)
    answers.clear()
    check_shared(Ranks(1), tmp_path / "run")


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    single = Ranks(0)
    single.num_processes = 1
    with pytest.raises(SettingsError, match="output_dir: cannot write to .*file"):
        check_shared(single, tmp_path / "file" / "run")


def test_too_little_shared_memory_is_found_before_it_kills_a_worker(monkeypatch, tmp_path):
    decoder = Decoder("image", "pixel_values", (3, 64, 64), None)
    dataset = SampleDataset([1] * 8, ImageDataConfig(dataset="photos"), decoder, train=True)
    loader = DataLoader(dataset, 4, num_workers=2)
    real = shutil.disk_usage(tmp_path)
    need = 2 * 2 * 4 * 3 * 64 * 64 * 4
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: real._replace(free=need))
    check_shared_memory(loader, None, folder=str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: real._replace(free=need - 1))
    with pytest.raises(SettingsError, match="num_workers: .*--shm-size"):
        check_shared_memory(loader, None, folder=str(tmp_path))
    check_shared_memory(DataLoader(dataset, 4), None, folder=str(tmp_path))
    check_shared_memory(DataLoader(torch.zeros(4), 4, num_workers=2), folder=str(tmp_path))


def test_a_dead_worker_is_one_line():
    bus = (
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's "
        "workers are out of shared memory. Please try to raise your shared memory limit."
    )
    assert "--shm-size" in worker_error(RuntimeError(bus))
    killed = worker_error(RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. \n"))
    assert "memory" in killed and "\n" not in killed
    assert worker_error(RuntimeError("mat1 and mat2 shapes")) is None
