"""Memory and throughput under load: does anything grow?

  python benchmarks/load.py images               10,000 images to codes, through AutoModel and the processor
  python benchmarks/load.py audio                an hour of audio to codes, in clips of 1 to 30 seconds
  python benchmarks/load.py training             1,000 steps of the image trainer, the real command
  python benchmarks/load.py images --count 500   a shorter look; --count is images, seconds or steps

Prints the resident memory at every tenth of the way, and how much it grew after the first fifth, in which
libraries fill their caches. The models are small (--help says how small): growth does not depend on it.
"""

import argparse
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import skimage.data
import soundfile
import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoModel

from modeling_simvq import (
    SimVQAudioConfig,
    SimVQAudioFeatureExtractor,
    SimVQAudioModel,
    SimVQImageConfig,
    SimVQImageModel,
    SimVQImageProcessor,
)

REPOSITORY = Path(__file__).resolve().parents[1]
COUNTS = {"images": 10_000, "audio": 3_600, "training": 1_000}
IMAGE_MODEL = {"base_channels": 32, "channel_multipliers": [1, 1, 2, 2], "num_res_blocks": 1}
IMAGE_MODEL |= {"codebook_size": 1024, "codebook_dim": 32}
AUDIO_MODEL = {"num_filters": 8, "codebook_size": 1024, "codebook_dim": 64, "hidden_size": 64}
AUDIO_MODEL |= {"intermediate_size": 128, "num_decoder_layers": 2}
BATCH = 16


def resident(pid: int | str = "self") -> float:
    """Resident memory of a process in MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status).group(1)) / 1024


class Record:
    """Resident memory over the way, printed at every tenth of it."""

    def __init__(self, count: int, unit: str):
        self.count, self.unit, self.start = count, unit, time.perf_counter()
        self.tenths: dict[int, float] = {}

    def note(self, done: int, memory: float) -> None:
        """Take the memory, in MiB, once in every tenth."""
        tenth = min(10, 10 * done // self.count)
        if tenth not in self.tenths:
            self.tenths[tenth] = memory
            tqdm.write(f"{tenth * 10:3d} %  {done:>6,} {self.unit}  {memory:7.0f} MiB")

    def report(self) -> None:
        """Print throughput and growth."""
        seconds = time.perf_counter() - self.start
        late = [memory for tenth, memory in self.tenths.items() if tenth >= 2]
        growth = f", memory after the first fifth: {late[-1] - late[0]:+.0f} MiB" if late else ""
        print(
            f"{self.count:,} {self.unit} in {seconds:.0f} s, {self.count / seconds:,.1f} a second{growth}"
        )


def pictures(count: int) -> Iterator[Image.Image]:
    """Pieces of photographs, each of another size."""
    photographs = [getattr(skimage.data, name)() for name in ("astronaut", "chelsea", "coffee")]
    draw = random.Random(0)
    for _ in range(count):
        photograph = draw.choice(photographs)
        height, width = draw.randint(130, 290), draw.randint(130, 290)
        top = draw.randint(0, photograph.shape[0] - height)
        left = draw.randint(0, photograph.shape[1] - width)
        yield Image.fromarray(photograph[top : top + height, left : left + width])


def encode_images(count: int, folder: str) -> None:
    """Images to codes, as the README has it."""
    SimVQImageModel(SimVQImageConfig(**IMAGE_MODEL)).save_pretrained(folder)
    SimVQImageProcessor().save_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    record, batch = Record(count, "pictures"), []
    for done, picture in enumerate(tqdm(pictures(count), total=count, disable=None), start=1):
        batch.append(picture)
        if len(batch) == BATCH or done == count:
            inputs = processor(batch, return_tensors="pt")
            with torch.no_grad():
                model.encode(**inputs)
            batch = []
            record.note(done, resident())
    record.report()


def clips(seconds: int, rate: int) -> Iterator[np.ndarray]:
    """Speech of the demo, repeated to clips of 1 to 30 seconds, of `seconds` in all."""
    files = sorted((REPOSITORY / "training" / "demo" / "speech" / "train").glob("*.flac"))
    speech = np.concatenate([soundfile.read(file, dtype="float32")[0] for file in files])
    draw, left = random.Random(0), seconds
    while left:
        length = min(left, draw.randint(1, 30))
        left -= length
        yield np.take(speech, np.arange(length * rate) + draw.randrange(len(speech)), mode="wrap")


def encode_audio(count: int, folder: str) -> None:
    """Audio to codes, in padded batches of four clips, as the README has it."""
    SimVQAudioModel(SimVQAudioConfig(**AUDIO_MODEL)).save_pretrained(folder)
    SimVQAudioFeatureExtractor().save_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    rate = extractor.sampling_rate
    record, batch, done = Record(count, "seconds"), [], 0
    with tqdm(total=count, disable=None) as bar:
        for clip in clips(count, rate):
            batch.append(clip)
            done += len(clip) // rate
            if len(batch) == 4 or done == count:
                inputs = extractor(batch, sampling_rate=rate, return_tensors="pt")
                with torch.no_grad():
                    model.encode(**inputs)
                batch = []
                record.note(done, resident())
                bar.update(done - bar.n)
    record.report()


def train(count: int, folder: str) -> None:
    """The image trainer in a process of its own, whose memory is read from outside."""
    for number, picture in enumerate(pictures(200)):
        path = Path(folder) / "photos" / ("validation" if number >= 192 else "train")
        path.mkdir(parents=True, exist_ok=True)
        picture.save(path / f"{number}.png")
    words = [f"{key}={value}".replace(" ", "") for key, value in IMAGE_MODEL.items()]
    words += [f"dataset={folder}/photos", f"output_dir={folder}/run", f"max_steps={count}"]
    words += ["epochs=1000000", "batch_size=4", "resolution=64", "num_workers=0", "perceptual=none"]
    words += ["discriminator_channels=16", "tracker=none", f"validate_every={max(1, count // 5)}"]
    words += [f"save_every={max(1, count // 5)}", "log_every=50"]
    command = [sys.executable, str(REPOSITORY / "training" / "train_image.py"), *words]
    record, line, waiting = Record(count, "steps"), "", ""
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        while letter := process.stderr.read(1):
            line += letter.decode(errors="replace")
            if letter not in b"\r\n":
                continue
            if step := re.search(rf"(\d+)/{count} ", line):
                record.note(int(step.group(1)), resident(process.pid))
            if found := re.search(r"\d+% of the time waiting for data", line):
                waiting = found.group()
            line = ""
    if process.returncode:
        sys.exit(process.returncode)
    record.report()
    print(f"in the last 50 steps {waiting}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nmodels: images {IMAGE_MODEL}; audio {AUDIO_MODEL}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=COUNTS)
    parser.add_argument("--count", type=int, help=f"how many (default: {COUNTS})")
    options = parser.parse_args()
    run = {"images": encode_images, "audio": encode_audio, "training": train}[options.what]
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="simvq-load-") as folder:
        run(options.count or COUNTS[options.what], folder)


if __name__ == "__main__":
    main()
