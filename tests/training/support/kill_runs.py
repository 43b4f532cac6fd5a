"""Kill training runs at random moments, and compare how they end with one that nobody disturbed.

python tests/training/support/kill_runs.py --kinds image,audio_stream --kills 100

Runs are forked from this process, which has imported everything once and computes nothing itself. A kind is
a modality, `_stream` if the data are streamed by a worker process, and `_ranks` for two processes. Prints
one line of JSON a kind; exit status 1 if a run did not end as the undisturbed one.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import datasets
import numpy as np
import skimage.data
import torch
from PIL import Image
from tqdm.auto import tqdm

from training.data.images import ImageDataConfig
from training.data.recordings import AudioDataConfig
from training.loop import reports
from training.loop import trainer as loop
from training.loop.checkpoint_files import load_tensors, verify
from training.loop.checkpoints import list_checkpoints
from training.recipes import audio as audio_recipe
from training.recipes import image as image_recipe
from training.recipes import run as launch
from training.recipes.audio import AudioLoopSettings, AudioLossSettings, AudioModelSettings
from training.recipes.image import ImageLossSettings, ImageModelSettings
from training.recipes.tokenizer import TokenizerLoopSettings

REPOSITORY = Path(__file__).resolve().parents[3]
STEPS = 10
COMMON = [
    f"max_steps={STEPS}",
    "epochs=100",
    "batch_size=2",
    "log_every=3",
    "validate_every=4",
    "save_every=2",
    "keep_checkpoints=2",
    "tracker=none",
    "warmup_steps=4",
    "lr_schedule=cosine",
    "num_workers=0",
]
IMAGE = [
    "resolution=32",
    "base_channels=32",
    "channel_multipliers=[1,2]",
    "num_res_blocks=1",
    "codebook_size=64",
    "codebook_dim=16",
    "discriminator_channels=8",
    "perceptual=none",
    "lecam_weight=0.1",
    "autoencoder_steps=3",
    "gradient_accumulation_steps=2",
]
AUDIO = [
    "clip_seconds=0.16",
    "num_filters=2",
    "codebook_size=64",
    "codebook_dim=16",
    "hidden_size=32",
    "intermediate_size=64",
    "num_decoder_layers=1",
    "period_channels=1",
    "resolution_channels=1",
    "dac_channels=1",
    "config_name=null",
    "train_split=train",
    "validation_split=validation",
]
GROUPS = {
    "image": {
        "data": ImageDataConfig,
        "model": ImageModelSettings,
        "loss": ImageLossSettings,
        "loop": TokenizerLoopSettings,
    },
    "audio": {
        "data": AudioDataConfig,
        "model": AudioModelSettings,
        "loss": AudioLossSettings,
        "loop": AudioLoopSettings,
    },
}
BUILD = {"image": image_recipe.build_image_recipe, "audio": audio_recipe.build_audio_recipe}


class Kind:
    """How runs of one kind are started, in a folder that has their data."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder = name, folder / name
        self.modality, *marks = name.split("_")
        self.ranks = 2 if "ranks" in marks else 1
        self.streaming = "stream" in marks
        self.folder.mkdir(parents=True)
        if self.modality == "image":
            self.data = self.folder / "photos"
            write_photos(self.data)
        else:
            self.data = REPOSITORY / "training" / "demo" / "speech"
        if self.streaming:  # a folder of files is never a stream
            self.data = write_tables(self.data, self.folder / "tables", self.modality)

    def start(self, run: Path, *words: str, spoil: int | None = None) -> list[int]:
        """Fork the ranks of a run; their process ids.

        Args:
            spoil: rank whose loss is NaN at step 3.
        """
        words = [*COMMON, *(IMAGE if self.modality == "image" else AUDIO), *words]
        words += [f"dataset={self.data}", f"output_dir={run}"]
        if self.streaming:
            words += ["streaming=true", "shuffle_buffer=5", "num_workers=1"]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        return [self._fork(run, words, rank, port, spoil == rank) for rank in range(self.ranks)]

    def _fork(self, run: Path, words: list[str], rank: int, port: int, spoil: bool) -> int:
        process = os.fork()
        if process:
            return process
        status = 1
        try:
            os.setpgid(0, 0)  # a group of its own, with its workers
            run.mkdir(exist_ok=True)
            log = os.open(run / f"log-{rank}.txt", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
            os.dup2(log, 1)
            os.dup2(log, 2)
            if self.ranks > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                os.environ |= {"WORLD_SIZE": str(self.ranks), "LOCAL_WORLD_SIZE": str(self.ranks)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            record_steps(run / f"steps-{rank}.jsonl", spoil)
            sys.argv = ["train.py", *words]
            launch.run(GROUPS[self.modality], BUILD[self.modality], "")
            status = 0
        except SystemExit as end:
            print(end.code, file=sys.stderr)
            status = end.code if isinstance(end.code, int) else 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)


def write_photos(folder: Path) -> None:
    """Tiles of a photograph, 24 to train on and 3 to validate on."""
    astronaut = skimage.data.astronaut()
    for split, count in (("train", 24), ("validation", 3)):
        (folder / split).mkdir(parents=True)
        for index in range(count):
            top, left = 64 * (index // 6), 64 * (index % 6)
            tile = Image.fromarray(astronaut[top : top + 48 + 2 * (index % 5), left : left + 64])
            tile.save(folder / split / f"{index}.png")


def write_tables(source: Path, folder: Path, column: str) -> Path:
    """The files of a folder's splits as Parquet, a table for each."""
    folder.mkdir()
    feature = {"image": datasets.Image, "audio": datasets.Audio}[column](decode=False)
    for split in ("train", "validation"):
        files = sorted(path for path in (source / split).iterdir() if path.is_file())
        cells = [{"bytes": path.read_bytes(), "path": path.name} for path in files]
        features = datasets.Features({column: feature})
        table = datasets.Dataset.from_dict({column: cells}, features=features)
        table.to_parquet(str(folder / f"{split}.parquet"))
    return folder


def record_steps(path: Path, spoil: bool) -> None:
    """Have every step written to a file: its number and all its figures, to the last bit."""
    settle, add = loop.Trainer._train_batch, reports.FigureMeans.add
    figures: list[str] = []

    def adding(self, values, *weights):
        figures.append({name: float(value).hex() for name, value in values.items()})
        add(self, values, *weights)

    def stepping(self, batch):
        if spoil and self.progress.step == 3:
            key = next(k for k in batch if k.endswith("_values"))
            batch = batch | {key: batch[key] * float("nan")}  # of bytes, floating numbers
        stepped = settle(self, batch)
        if stepped:
            line = {"step": self.progress.step, "figures": figures}
            with path.open("a") as lines:
                lines.write(json.dumps(line) + "\n")
            figures.clear()
        return stepped

    loop.Trainer._train_batch, reports.FigureMeans.add = stepping, adding


def wait_for(processes: list[int]) -> list[int]:
    """Exit status of each; minus the signal if one ended it."""
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]


def running(processes: list[int]) -> bool:
    """Whether none of them has ended; does not reap them."""
    options = os.WEXITED | os.WNOWAIT | os.WNOHANG
    return all(os.waitid(os.P_PID, process, options) is None for process in processes)


def kill_somewhere(run: Path, processes: list[int], chance: random.Random) -> bool:
    """SIGKILL to all, at a random moment; False if the run had ended before.

    A third at any time, start-up included; a third in the middle of the training; a third after the run
    has begun to write a checkpoint.
    """
    moment = chance.choice(("any", "steps", "write"))
    recorded = run / "steps-0.jsonl"
    size = recorded.stat().st_size if recorded.exists() else 0
    checkpoints = run / "checkpoints"

    def begun() -> bool:
        if moment == "steps":
            return recorded.exists() and recorded.stat().st_size > size
        return any(checkpoints.glob(".partial-*"))

    while moment != "any" and running(processes) and not begun():
        time.sleep(0.0005)
    pauses = {"any": 3.0, "steps": 0.6, "write": 0.04}
    time.sleep(chance.uniform(0, pauses[moment]))
    if not running(processes):
        return False
    for process in processes:
        os.kill(process, signal.SIGKILL)
    return True


def steps_of(run: Path, rank: int) -> dict[int, list]:
    """Figures by step. A killed run repeats steps: they must be the same each time."""
    found: dict[int, list] = {}
    for line in (run / f"steps-{rank}.jsonl").read_text().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:  # cut off by a kill
            continue
        former = found.setdefault(entry["step"], entry["figures"])
        for place in differences(
            former, entry["figures"], f"{run} repeated step {entry['step']}: "
        ):
            raise AssertionError(f"{place} on rank {rank}")
    return found


def state_of(run: Path) -> dict:
    """All tensors and numbers of the last checkpoint."""
    from accelerate.utils import load
    from safetensors.torch import load_file

    newest = list_checkpoints(run)[-1]
    verify(newest)
    read = {".safetensors": load_file, ".bin": load_tensors, ".pt": load_tensors, ".pkl": load}
    return {p.name: read[p.suffix](p) for p in newest.iterdir() if p.suffix in read}


def differences(first, second, name: str = "") -> list[str]:
    """Where two states differ, to the bit."""
    if isinstance(first, dict) and isinstance(second, dict):
        if first.keys() != second.keys():
            return [f"{name}: {first.keys() ^ second.keys()}"]
        return [d for key in first for d in differences(first[key], second[key], f"{name}/{key}")]
    if isinstance(first, (list, tuple)):
        if len(first) != len(second):
            return [name]
        pairs = enumerate(zip(first, second, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, f"{name}/{i}")]
    if isinstance(first, torch.Tensor):
        same = first.dtype == second.dtype and torch.equal(first, second)
    elif isinstance(first, np.ndarray):
        same = np.array_equal(first, second)
    else:
        same = first == second
    return [] if same else [name]


def compare(kind: Kind, run: Path, reference: Path) -> list[str]:
    """What a finished run has otherwise than the undisturbed one."""
    found = differences(state_of(run), state_of(reference))
    for rank in range(kind.ranks):
        found += differences(
            steps_of(run, rank), steps_of(reference, rank), f"steps of rank {rank}"
        )
    for name in ("figures.jsonl", "model/model.safetensors"):
        if (run / name).read_bytes() != (reference / name).read_bytes():
            found.append(name)
    left = [p.name for p in (run / "checkpoints").iterdir() if not p.name.startswith("step-")]
    return found + left


def killed(kind: Kind, kills: int, seed: int) -> dict:
    """Kill runs so many times, and compare all those that came to their end."""
    chance = random.Random(seed)
    reference = kind.folder / "undisturbed"
    began = time.perf_counter()
    if any(wait_for(kind.start(reference))):
        return {"kind": kind.name, "failed": (reference / "log-0.txt").read_text()[-2000:]}
    counts = {"kind": kind.name, "seed": seed, "kills": 0, "in_a_write": 0, "finished": 0}
    bar = tqdm(total=kills, desc=kind.name, unit="kill", mininterval=5)
    while counts["kills"] < kills or counts["finished"] == 0:
        run = kind.folder / f"run-{counts['finished']}"
        processes = kind.start(run, "resume=latest")
        alive = counts["kills"] < kills and kill_somewhere(run, processes, chance)
        status = wait_for(processes)
        if alive:
            counts["kills"] += 1
            counts["in_a_write"] += any((run / "checkpoints").glob(".partial-*"))
            bar.update()
            continue
        found = [f"status {status}"] if any(status) else compare(kind, run, reference)
        if found:
            log = (run / "log-0.txt").read_text()[-2000:]
            return counts | {"failed": f"{found[:9]}\n{log}"}
        counts["finished"] += 1
        shutil.rmtree(run)
    bar.close()
    return counts | {"seconds": round(time.perf_counter() - began)}


def stopped(kind: Kind, number: signal.Signals) -> dict:
    """Send a signal to the last rank and its workers alone, as a scheduler may; go on, and compare."""
    reference, run = kind.folder / "undisturbed", kind.folder / "stopped"
    shutil.rmtree(run, ignore_errors=True)
    processes = kind.start(run)
    steps = run / "steps-0.jsonl"
    while running(processes) and not (steps.exists() and steps.read_text().count("\n") >= 3):
        time.sleep(0.001)
    os.killpg(processes[-1], number)
    status = wait_for(processes)
    at = len(steps.read_text().splitlines())
    log = (run / "log-0.txt").read_text()
    ended = wait_for(kind.start(run, "resume=latest"))
    found = [f"status {ended}"] if any(ended) else compare(kind, run, reference)
    return {
        "kind": kind.name,
        "signal": number.name,
        "status": status,
        "at_step": at,
        "said_so": f"stopped at step {at} of {STEPS}: resume=latest goes on" in log,
        "differences": found,
        "log": "" if not found else (run / "log-0.txt").read_text()[-2000:],
    }


def spoiled(kind: Kind) -> dict:
    """NaN in the last rank's batch: all ranks skip that step."""
    run = kind.folder / "spoiled"
    status = wait_for(kind.start(run, spoil=kind.ranks - 1))
    empty = [
        {step for step, figures in steps_of(run, rank).items() if not figures}
        for rank in range(kind.ranks)
    ]
    log = (run / "log-0.txt").read_text()
    return {
        "kind": kind.name,
        "status": status,
        "skipped": [sorted(steps) for steps in empty],
        "cause": next((line for line in log.splitlines() if "skipped, its values" in line), log),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", default="image,image_stream,audio,audio_stream,image_ranks")
    parser.add_argument("--kills", type=int, default=20, help="of each kind")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(3)))
    parser.add_argument(
        "--signals", default="", help="SIGTERM,SIGUSR1,SIGINT: each sent once as well"
    )
    parser.add_argument("--spoil", action="store_true", help="NaN in one rank's batch as well")
    arguments = parser.parse_args()
    tqdm.monitor_interval = 0  # no thread besides, for this process forks
    torch.set_num_threads(1)
    os.environ |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = f"{folder}/cache"
        for name in arguments.kinds.split(","):
            kind = Kind(name, Path(folder))
            results = [killed(kind, arguments.kills, arguments.seed)]
            for number in filter(None, arguments.signals.split(",")):
                results.append(stopped(kind, signal.Signals[number]))
            if arguments.spoil:
                results.append(spoiled(kind))
            for result in results:
                print(json.dumps(result), flush=True)
                failed |= bool(result.get("failed") or result.get("differences"))
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
