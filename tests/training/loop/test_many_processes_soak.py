"""Launches that take minutes: two machines on the loopback address, and twenty ends of two ranks."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import skimage.data
from PIL import Image
from safetensors.torch import load_file

from tests.support.programs import CPU, ONE_PROCESS, PLAIN_LAUNCH, REPOSITORY, TWO_RANKS, free_port

LAUNCHERS = REPOSITORY / "training" / "configs" / "accelerate"
TINY = ["resolution=32", "num_workers=0", "base_channels=32", "channel_multipliers=[1,2]"]
TINY += ["num_res_blocks=1", "codebook_size=64", "codebook_dim=16", "discriminator_channels=8"]
TINY += ["perceptual=none", "tracker=none", "log_every=1"]
TRAINER = str(REPOSITORY / "training" / "train_image.py")
LAUNCHES = 20


def launch(*words: str, launcher: tuple[str, ...] = ONE_PROCESS, cache: str):
    """Run `accelerate launch` itself, with its agent."""
    command = [sys.executable, "-m", "accelerate.commands.launch", *PLAIN_LAUNCH, *launcher]
    if "--main_process_port" not in launcher:  # other launches may run at the same time
        command += ["--main_process_port", free_port()]
    environment = os.environ | CPU | {"HF_HOME": cache, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [*command, *words], env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture
def photos(tmp_path) -> str:
    """Tiles of a photograph."""
    picture = skimage.data.astronaut()
    for split, count in (("train", 16), ("validation", 3)):
        folder = tmp_path / "photos" / split
        folder.mkdir(parents=True)
        for n in range(count):
            top, left = 64 * (n // 4), 64 * (n % 4)
            tile = picture[top : top + 64, left : left + 64]
            Image.fromarray(tile).save(folder / f"{n}.png")
    return str(tmp_path / "photos")


@pytest.mark.soak
def test_two_machines_train_what_one_does(photos, tmp_path):
    """One process on each of two machines, which are this one, against two processes on one machine."""
    words = [TRAINER, *TINY, f"dataset={photos}", "batch_size=4", "max_steps=4", "epochs=9"]
    cache = str(tmp_path / "cache")
    alone = launch(*words, f"output_dir={tmp_path / 'one'}", cache=cache)
    assert alone.returncode == 0, alone.stderr
    port, config = free_port(), str(LAUNCHERS / "multi_node.yaml")

    def machine(rank: int):
        launcher = ("--config_file", config, "--num_processes", "2", "--machine_rank", str(rank))
        launcher += ("--main_process_ip", "127.0.0.1", "--main_process_port", port)
        output = f"output_dir={tmp_path / 'two'}"
        return launch(*words, output, launcher=launcher, cache=f"{cache}-{rank}")

    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(machine, (0, 1)))
    for one in done:
        assert one.returncode == 0, one.stdout + one.stderr
    said = done[0].stdout + done[0].stderr
    assert "2 process(es) on cpu" in said and "8 samples per step" in said
    ours, theirs = (load_file(tmp_path / n / "model" / "model.safetensors") for n in ("one", "two"))
    for name, values in ours.items():
        assert values.equal(theirs[name]), name


@pytest.mark.soak
def test_two_ranks_end_in_order(photos, tmp_path):
    """Without end_processes gloo's threads outlive the interpreter, and a run may abort with its work done."""
    for number in range(LAUNCHES):
        words = [*TINY, f"dataset={photos}", "max_steps=2", "batch_size=4"]
        output = f"output_dir={tmp_path / str(number)}"
        done = launch(TRAINER, *words, output, launcher=TWO_RANKS, cache=str(tmp_path / "cache"))
        said = done.stdout + done.stderr
        assert done.returncode == 0 and "terminate called" not in said, (number, said)
        assert "2 process(es)" in said
    print(f"{LAUNCHES} launches of two ranks, each ended with status 0")
