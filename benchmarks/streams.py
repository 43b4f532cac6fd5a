"""Streams: what ranks and their workers read, decode and use, and how long a resume takes.

  python benchmarks/streams.py share                       the table of ranks x workers, on this machine
  python benchmarks/streams.py resume                      a stream, resumed behind a million rows
  python benchmarks/streams.py share --ranks 1,2 --workers 0,2 --images 4000

`share` writes shards of small JPEG files, and lets ranks, joined by gloo, go through one epoch of the image
trainer's own loader. Rows are counted where Datasets gives them out, decodings where files are decoded, in all
processes; memory is what ranks and workers come to hold (PSS). `resume` compares the batches.
"""

import argparse
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
import psutil
import skimage.data
import torch
import torch.distributed as dist
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training.data import images as image_data
from training.data.images import ImageDataConfig, build_image_dataloader

SIDE, BATCH = 64, 16
ROWS, GROUP = 1_100_000, 1000  # of the long stream, and of its row groups


def encoded(picture: Image.Image, kind: str) -> bytes:
    """Return the bytes of a file."""
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return buffer.getvalue()


def write_shards(folder: Path, images: int, shards: int) -> None:
    """Write pieces of a photograph as Parquet, the shards of nearly equal length."""
    photograph = Image.fromarray(skimage.data.astronaut())
    generator = np.random.default_rng(0)
    for shard in range(shards):
        cells = []
        for _ in range(shard, images, shards):
            left, top = generator.integers(0, 512 - 160, 2)
            piece = photograph.crop((left, top, left + 160, top + 128))
            cells.append({"bytes": encoded(piece, "JPEG"), "path": None})
        table = datasets.Dataset.from_dict({"image": cells}).cast_column("image", datasets.Image())
        table.to_parquet(folder / f"train-{shard:05}-of-{shards:05}.parquet", batch_size=100)


class Counts:
    """Rows given out by Datasets and files decoded, by this process and those that it forks."""

    def __init__(self):
        self.numbers = torch.zeros(2, dtype=torch.int64).share_memory_()
        self._count_rows("__iter__")
        self._count_rows("iter")
        decode = image_data.decode_crops

        def counted(*arguments):
            self.numbers[1] += 1
            return decode(*arguments)

        image_data.decode_crops = counted

    def _count_rows(self, name: str) -> None:
        method = getattr(datasets.IterableDataset, name)

        def counted(source, *arguments, **options):
            for row in method(source, *arguments, **options):
                self.numbers[0] += 1
                yield row

        setattr(datasets.IterableDataset, name, counted)


def own_memory() -> float:
    """Memory of this process and its workers in MiB; what they share counts once."""
    process = psutil.Process()
    total = 0
    for one in (process, *process.children(recursive=True)):
        try:
            total += one.memory_full_info().pss
        except psutil.NoSuchProcess:
            continue
    return total / 2**20


def one_rank(options: argparse.Namespace) -> None:
    """Go through an epoch as one of several ranks."""
    from accelerate import Accelerator

    torch.set_num_threads(1)
    accelerator, counts = Accelerator(cpu=True), Counts()
    config = ImageDataConfig(
        dataset=options.folder,
        resolution=SIDE,
        streaming=True,
        num_workers=int(options.workers),
        shuffle_buffer=options.buffer,
    )
    loader = build_image_dataloader(config, "train", batch_size=BATCH, train=True, seed=0)
    loader = accelerator.prepare(loader)
    before, used, peak, start = own_memory(), 0, 0.0, None
    for number, batch in enumerate(loader):
        if number == 0:  # buffers are full, workers have begun
            start, begun = time.perf_counter(), len(batch["valid"])
        used += len(batch["valid"])
        if number % 10 == 0:
            peak = max(peak, own_memory() - before)
    seconds = time.perf_counter() - start
    accelerator.wait_for_everyone()
    found = torch.tensor([*counts.numbers.tolist(), used, (used - begun) / seconds, peak])
    found = accelerator.gather(found.double()[None])
    if accelerator.is_main_process:
        print(json.dumps(found.tolist()))
    if dist.is_initialized():
        dist.destroy_process_group()


def free_port() -> str:
    """Return a port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def launch(
    folder: Path, ranks: int, workers: int, options: argparse.Namespace
) -> list[list[float]]:
    """Start the ranks; returns what each of them counted."""
    command = [sys.executable, __file__, "rank", "--folder", str(folder)]
    command += ["--workers", str(workers), "--buffer", str(options.buffer)]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(ranks)}
    if ranks == 1:
        shared = {}
    shared |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    running = []
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        running.append(
            subprocess.Popen(
                command,
                env=os.environ | shared | own,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    outputs = [process.communicate() for process in running]
    for process, (_, errors) in zip(running, outputs, strict=True):
        if process.returncode:
            raise SystemExit(errors)
    return json.loads(outputs[0][0].strip().splitlines()[-1])


def share(options: argparse.Namespace) -> None:
    """Print the table of ranks x workers."""
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder), options.images, options.shards)
        print(f"{options.images:,} images in {options.shards} shards, batch {BATCH} a rank")
        print(
            "| ranks | workers each | rows read | decoded | used | images a second | memory, MiB |"
        )
        print("|---|---|---|---|---|---|---|")
        for ranks in map(int, options.ranks.split(",")):
            for workers in map(int, options.workers.split(",")):
                found = launch(Path(folder), ranks, workers, options)
                read, decoded, used, rate, memory = zip(*found, strict=True)
                cells = [", ".join(f"{int(n):,}" for n in some) for some in (read, decoded, used)]
                row = [ranks, workers, *cells, f"{sum(rate):,.0f}", f"{sum(memory):,.0f}"]
                print(f"| {' | '.join(map(str, row))} |", flush=True)


def resume(options: argparse.Namespace) -> None:
    """Print how long a resume behind a million rows takes until its first batch."""
    cell = {"bytes": encoded(Image.new("RGB", (8, 8), (9, 99, 199)), "PNG"), "path": None}
    with tempfile.TemporaryDirectory() as folder:
        rows = datasets.Dataset.from_dict(
            {"image": [cell] * ROWS, "label": range(ROWS)}
        ).cast_column("image", datasets.Image())
        rows.to_parquet(Path(folder) / "train.parquet", batch_size=GROUP)
        config = ImageDataConfig(
            dataset=folder,
            resolution=8,
            streaming=True,
            num_workers=0,
            shuffle_buffer=options.buffer,
        )

        def loader():
            return build_image_dataloader(config, "train", batch_size=BATCH, train=True, seed=0)

        batches = 1_000_000 // BATCH
        first, seen = loader(), []
        start = time.perf_counter()
        first.skip(0, batches - 1)
        through = iter(first)
        next(through)
        print(f"read up to row {batches * BATCH:,}: {time.perf_counter() - start:.1f} s")
        state = first.state_dict()
        seen = [next(through) for _ in range(20)]
        for _ in range(3):
            start = time.perf_counter()
            second = loader()
            second.load_state_dict(state)
            second.skip(0, batches)
            again = iter(second)
            found = [next(again)]
            print(f"resumed there: first batch after {time.perf_counter() - start:.2f} s")
        found += [next(again) for _ in range(19)]
        same = all(
            torch.equal(a[name], b[name]) for a, b in zip(seen, found, strict=True) for name in a
        )
        print(f"the batches are the same: {same}; state: {len(json.dumps(state)):,} bytes")


def main() -> None:
    """Command line."""
    datasets.disable_progress_bars()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("share", "resume", "rank"))
    parser.add_argument("--ranks", default="1,2,4")
    parser.add_argument("--workers", default="0,1,2")
    parser.add_argument("--images", type=int, default=6000)
    parser.add_argument("--shards", type=int, default=13)
    parser.add_argument("--buffer", type=int, default=1000, help="shuffle_buffer")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    {"share": share, "resume": resume, "rank": one_rank}[options.part](options)


if __name__ == "__main__":
    main()
