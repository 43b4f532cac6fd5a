"""Tokenization of a dataset: the cost of each row, and images a second of the real command.

  python benchmarks/tokenization.py units                  decode, check, digest: microseconds a row, one thread
  python benchmarks/tokenization.py command                tokenize_dataset on 2,000 images, each way in turn
  python benchmarks/tokenization.py command --images 9000  longer; --ways flips=true,crops=3 names others

Images are pieces of a photograph, JPEGs of 500 x 375 in Parquet. The command's model is small (base width 32,
K = 1,024); its resident memory is read four times a second. docs/scale.md plans with these figures.
"""

import argparse
import io
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import psutil
import pyarrow.parquet
import skimage.data
import torch
from PIL import Image
from tqdm.auto import tqdm

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

from load import IMAGE_MODEL  # noqa: E402

from hub_cards.dataset_card import CHECKED_ROWS, _check_codes, content_digest  # noqa: E402
from modeling_simvq import SimVQImageConfig, SimVQImageModel, SimVQImageProcessor  # noqa: E402
from training.data.images import decode_crops  # noqa: E402

PLAIN = "num_workers=2"
WAYS = f"num_workers=0,{PLAIN},{PLAIN} dtype=bfloat16,{PLAIN} compile=true"
CODES, CODEBOOK, ROWS_PER_FILE = 256, 262_144, 64


def jpegs(count: int, width: int = 500, height: int = 375) -> list[bytes]:
    """Pieces of a photograph, each another."""
    photograph = Image.fromarray(skimage.data.retina())  # 1,411 pixels a side
    rest, files = photograph.width - width, []
    for index in range(count):
        left, top = index * 37 % rest, index * 53 % (photograph.height - height)
        file = io.BytesIO()
        photograph.crop((left, top, left + width, top + height)).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def cost(work: Callable[[], object], rows: int, runs: int) -> float:
    """Return microseconds a row, the median of several runs."""
    work()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times) / rows


def units(options: argparse.Namespace) -> None:
    """Print what a row costs, part by part."""
    torch.set_num_threads(1)
    files = jpegs(32)
    cells = [{"bytes": file, "path": None} for file in files]
    print(f"a JPEG of 500 x 375: {sum(map(len, files)) / len(files) / 1e3:.1f} kB")

    def decode(crops: int) -> None:
        generators = [torch.Generator().manual_seed(n) for n in range(crops)] or [None]
        for cell in cells:
            decode_crops(cell, "row", generators, 256)

    print(f"decode and resize to 256: {cost(lambda: decode(0), 32, options.runs):,.0f} us")
    print(f"with 8 random crops: {cost(lambda: decode(8), 32, options.runs):,.0f} us")
    rows = 32_768
    codes = np.random.default_rng(0).integers(CODEBOOK, size=(rows, 16, 16), dtype=np.uint32)
    feature = datasets.List(datasets.List(datasets.Value("uint32"), length=16), length=16)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "codes.parquet"
        made = {"image_codes": codes, "source_row": np.arange(rows)}
        features = datasets.Features(
            {"image_codes": feature, "source_row": datasets.Value("int64")}
        )
        datasets.Dataset.from_dict(made, features=features).to_parquet(path)
        print(f"a row of {CODES} codes of {CODEBOOK:,}: {path.stat().st_size / rows:,.0f} bytes")

        def check() -> None:
            with pyarrow.parquet.ParquetFile(path) as table:
                for batch in table.iter_batches(CHECKED_ROWS, columns=["image_codes"]):
                    _check_codes(batch.column("image_codes"), "image_codes", CODEBOOK)

        print(f"check before a push: {cost(check, rows, options.runs):.2f} us")
        digest = cost(lambda: content_digest([path]), rows, options.runs)
        print(f"digest of its file: {digest:.2f} us")


def one_way(folder: Path, output: Path, way: str, options: argparse.Namespace) -> tuple[float, ...]:
    """Run the command; return images a second, the most memory and its growth, in MiB."""
    program = [sys.executable, str(REPOSITORY / "training" / "tokenize_dataset.py")]
    words = [
        f"model={folder / 'model'}",
        f"dataset={folder / 'images'}",
        f"output={output}",
    ]
    words += [
        "splits=[train]",
        f"resolution={options.resolution}",
        f"rows_per_file={ROWS_PER_FILE}",
        *way.split(),
    ]
    memory: list[tuple[float, int]] = []  # MiB, files written
    with subprocess.Popen(
        [*program, *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        while process.poll() is None:
            files = len(list(output.glob("data/*.parquet")))
            memory.append((psutil.Process(process.pid).memory_info().rss / 2**20, files))
            time.sleep(0.25)
        printed = process.stdout.read()
    if process.returncode:
        sys.exit(f"{' '.join(words)} ended with status {process.returncode}")
    speed = float(re.search(r": ([\d.,]+) images and", printed)[1].replace(",", ""))
    late = [held for held, files in memory if files >= 0.2 * options.images / ROWS_PER_FILE]
    eighth = len(late) // 8
    growth = statistics.median(late[-eighth:]) - statistics.median(late[:eighth])
    return speed, max(late), growth


def command(options: argparse.Namespace) -> None:
    """Run the command each way, in turns, and print the medians."""
    results: dict[str, list[tuple[float, ...]]] = {way: [] for way in options.ways.split(",")}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        SimVQImageModel(SimVQImageConfig(**IMAGE_MODEL)).save_pretrained(folder / "model")
        SimVQImageProcessor().save_pretrained(folder / "model")
        (folder / "images").mkdir()
        files = jpegs(64)
        cells = [{"bytes": files[n % 64], "path": None} for n in range(options.images)]
        rows = datasets.Dataset.from_dict({"image": cells}).cast_column("image", datasets.Image())
        rows.to_parquet(folder / "images" / "train.parquet")
        turns = [(turn, way) for turn in range(options.runs) for way in results]
        for turn, way in tqdm(turns, unit="run"):
            output = folder / f"codes-{turn}-{way.replace(' ', '-')}"
            results[way].append(one_way(folder, output, way, options))
    print(
        f"{options.images:,} images, {options.resolution} pixels, {torch.get_num_threads()} threads"
    )
    print(
        "| way | images a second | most memory, MiB | growth after the first fifth, MiB |\n|---|---|---|---|"
    )
    for way, runs in results.items():
        speed, memory, growth = map(statistics.median, zip(*runs, strict=True))
        print(f"| {way} | {speed:.1f} | {memory:,.0f} | {growth:+.0f} |")


def main() -> None:
    """Command line."""
    datasets.disable_progress_bars()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("units", "command"))
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--ways", default=WAYS, help="settings of each way; ways are separated by commas"
    )
    options = parser.parse_args()
    {"units": units, "command": command}[options.part](options)


if __name__ == "__main__":
    main()
