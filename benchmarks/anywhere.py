"""A tokenizer in every format, engine and type, beside the model in float32: codes, errors, sizes, times.

  python benchmarks/anywhere.py hub_cards/checkpoints/simvq-image-small --inputs PHOTOGRAPHS
  python benchmarks/anywhere.py hub_cards/checkpoints/simvq-speech-small --inputs RECORDINGS --ways onnx,compile
  python benchmarks/anywhere.py --code-model              a code model with weights of 8 bits, by torchao
  python benchmarks/anywhere.py --memory                  of the exported search, 262,144 codes

One thread. Every way takes turns with the model on each input; times are medians, of images of 192 x 192
pixels or of clips of up to 10 seconds. "Other codes" are farther from the model's own latents than the model's
codes, by more than 1e-4 of the distance; "worst error" is of decoding the model's codes, its largest value 1.
PSNR, or the mel distance (natural logarithms), is of what the way encodes and decodes, against the input. The
output is rows of the table in docs/anywhere.md.
"""

import argparse
import copy
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from modeling_simvq.command_media import media_of  # noqa: E402
from modeling_simvq.command_model import Tokenizer, load_tokenizer  # noqa: E402
from modeling_simvq.exportable import PARTS, is_audio, run_part  # noqa: E402
from modeling_simvq.exported_files import (  # noqa: E402
    megabytes_of,
    open_part,
    other_codes,
    write_part,
)
from training.losses.mel import LogMelSpectrogram  # noqa: E402
from training.metrics.images import image_figures  # noqa: E402

WAYS = [
    *(
        "torch",
        "onnx",
        "onnx:float16",
        "onnx:int8",
        "openvino",
        "openvino:float16",
        "openvino:int8",
    ),
    *("executorch", "compile", "bfloat16", "float16"),
]
SIDE, SECONDS, RUNS = 192, 10, 5
HEAD = (
    "| model | way | other codes | worst error | {quality} | size, MB | encoding, {unit} | decoding, {unit} "
    "| of the model's time |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


class Way(NamedTuple):
    """A way to run a tokenizer: encode, values to codes; decode, codes to values; megabytes of its files."""

    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    megabytes: float


def eager(model) -> Way:
    """The model itself."""
    encode, decode = (partial(run_part, model, part) for part in PARTS)
    return Way(encode, decode, sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6)


def make(way: str, tokenizer: Tokenizer, folder: Path) -> Way:
    """Make a way of WAYS."""
    model = tokenizer.model
    if way == "compile":
        run = eager(model)
        return run._replace(
            encode=torch.compile(run.encode, fullgraph=True, dynamic=False),
            decode=torch.compile(run.decode, fullgraph=True, dynamic=False),
        )
    if way in ("bfloat16", "float16"):
        return eager(copy.deepcopy(model).to(getattr(torch, way)))
    format, _, weights = way.partition(":")
    paths = [write_part(model, part, format, folder, weights or "float32") for part in PARTS]
    opened = (open_part(path, threads=1) for path in paths)
    return Way(*opened, sum(map(megabytes_of, paths)))


def inputs_of(tokenizer: Tokenizer, folder: Path, count: int) -> list[Tensor]:
    """Read images, the middle SIDE x SIDE pixels, or clips, whole frames of the first SECONDS."""
    media, values = media_of(tokenizer), []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if path.suffix.lower() not in (*media.read_suffixes, ".flac", ".ogg"):
            continue
        if is_audio(tokenizer.model):
            values.append(clip(tokenizer, path))
        else:
            image = media.read(path.read_bytes(), path.name)[0]
            top, left = (max(0, size - SIDE) // 2 for size in image.shape[1:])
            piece = image[None, :, top : top + SIDE, left : left + SIDE]
            values.append(piece.contiguous())  # other strides would be compiled again
        if len(values) == count:
            break
    if not values:
        raise SystemExit(f"{folder} has no files that {tokenizer.name} takes")
    return values


def clip(tokenizer: Tokenizer, path: Path) -> Tensor:
    """Read a recording, resampled to the model's rate."""
    import soundfile
    import soxr

    config = tokenizer.model.config
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    samples = soxr.resample(samples.mean(axis=1), rate, config.sampling_rate)
    frames = min(len(samples), SECONDS * config.sampling_rate) // config.hop_length
    return torch.from_numpy(samples[: frames * config.hop_length]).float()[None, None]


def quality_of(model) -> tuple[str, Callable[[Tensor, Tensor], float]]:
    """Return the name and function of what a reconstruction is judged by, beside its input."""
    if not is_audio(model):
        return "PSNR, dB", lambda given, made: float(image_figures(given, made.float())["psnr"])
    mel = LogMelSpectrogram(model.config.sampling_rate)
    return "mel distance", lambda given, made: float(
        (mel(given[0]) - mel(made[0].float())).abs().mean()
    )


@torch.no_grad()
def row(name: str, way: str, run: Way, reference: Way, model, inputs: list[Tensor]) -> str:
    """Measure a way beside the reference on every input; return a row of the table."""
    _, quality = quality_of(model)
    others = total = 0
    errors, qualities, times = [], [], []
    for values in tqdm(inputs, desc=way, leave=False):
        codes, own = run.encode(values), reference.encode(values)
        counted, wrong = other_codes(model, values, codes)
        total, others = total + counted, others + wrong
        expected, made = reference.decode(own), run.decode(own)
        errors.append(float((made.float() - expected).abs().max() / expected.abs().max()))
        qualities.append(quality(values, run.decode(codes)))
    for values in inputs[:RUNS]:  # one of each size has run: what a first run costs is over
        codes = reference.encode(values)
        length = values.shape[-1] / model.config.sampling_rate if is_audio(model) else 1
        times.append(
            [
                clocked(function, given) / length
                for function, given in (
                    *((reference.encode, values), (run.encode, values)),
                    *((reference.decode, codes), (run.decode, codes)),
                )
            ]
        )
    was_encoding, encoding, was_decoding, decoding = map(
        statistics.median, zip(*times, strict=True)
    )
    cells = [
        *(name, way, f"{others:,} of {total:,}", f"{max(errors):.1e}"),
        f"{statistics.mean(qualities):.3f}",
        *(f"{run.megabytes:.1f}", f"{1000 * encoding:.1f}", f"{1000 * decoding:.1f}"),
        f"{encoding / was_encoding:.2f}, {decoding / was_decoding:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def clocked(function: Callable[[Tensor], Tensor], values: Tensor) -> float:
    """Return the seconds of a call, the least of three."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        function(values)
        times.append(time.perf_counter() - start)
    return min(times)


def table(options: argparse.Namespace) -> None:
    """Print a row for each way."""
    tokenizer = load_tokenizer(options.model)
    inputs = inputs_of(tokenizer, Path(options.inputs), options.count)
    reference, name = eager(tokenizer.model), Path(options.model).name
    unit = "ms a second" if is_audio(tokenizer.model) else "ms"
    print(HEAD.format(quality=quality_of(tokenizer.model)[0], unit=unit))
    print(row(name, "the model", reference, reference, tokenizer.model, inputs), flush=True)
    for way in options.ways.split(","):
        with tempfile.TemporaryDirectory() as folder:
            try:
                run = make(way, tokenizer, Path(folder))
                # Each other shape would be compiled for half a minute.
                shape = Counter(values.shape for values in inputs).most_common(1)[0][0]
                some = [v for v in inputs if v.shape == shape] if way == "compile" else inputs
                print(row(name, way, run, reference, tokenizer.model, some), flush=True)
            except (ValueError, RuntimeError) as error:
                print(f"{way}: {error}", file=sys.stderr)


@torch.no_grad()
def code_model() -> None:
    """Print the loss and speed of a code model of 85 M parameters, drawn at random, and with 8-bit weights."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    from modeling_simvq import SimVQForImageGeneration, SimVQImageGenerationConfig

    torch.manual_seed(0)
    # Sharper than at the start of training, so that there is something to lose.
    config = SimVQImageGenerationConfig(codebook_size=1024, num_classes=10, initializer_range=0.06)
    model = SimVQForImageGeneration(config).eval()
    small = copy.deepcopy(model)
    quantize_(small, Int8WeightOnlyConfig())
    labels, height_width = torch.arange(2), config.grid_size
    made, times = {}, {"float32": [], "int8": []}
    for name, run in (("float32", model), ("int8", small)):
        made[name] = run.generate_images(labels, generator=torch.Generator().manual_seed(0))
    codes = made["float32"]
    losses = {
        name: float(run(image_codes=codes, class_labels=labels).loss)
        for name, run in (("float32", model), ("int8", small))
    }
    for _ in range(RUNS):
        for name, run in (("float32", model), ("int8", small)):
            start = time.perf_counter()
            run.generate_images(labels, generator=torch.Generator().manual_seed(0))
            times[name].append(time.perf_counter() - start)
    tokens = len(labels) * height_width[0] * height_width[1]
    for name, seconds in times.items():
        print(
            f"{name}: {losses[name]:.4f} nats a code of the float32 model's samples, "
            f"{tokens / statistics.median(seconds):.0f} codes a second"
        )


def memory(codebook_size: int = 262_144, width: int = 128, tokens: int = 1024) -> None:
    """Print what the search of an exported encoder adds to a process, beside its scores all at once."""
    scores = tokens * codebook_size * 4 / 2**20
    print(
        f"{codebook_size:,} codes of {width}, {tokens:,} latents; all scores at once: {scores:,.0f} MiB"
    )
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "search.onnx"))
        for step in ("write", "open", "run"):
            command = [sys.executable, __file__, "--memory-of", step, path]
            command += [str(n) for n in (codebook_size, width, tokens)]
            peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            if step != "write":
                print(f"onnxruntime, {step}: peak {float(peak):,.0f} MiB")


def memory_of(step: str, path: str, codebook_size: int, width: int, tokens: int) -> None:
    """Do one step of the above, in a process of its own, and print its peak of resident memory in MiB."""
    generator = torch.Generator().manual_seed(0)
    if step == "write":
        from modeling_simvq.exportable import FixedCodebook

        codebook = FixedCodebook(torch.randn(codebook_size, width, generator=generator))

        class Search(torch.nn.Module):
            def forward(self, latents: Tensor) -> Tensor:
                return codebook(latents)[1]

        module = Search()
        module.codebook = codebook
        latents = torch.randn(1, width, 16, generator=generator)
        shapes = ({2: torch.export.Dim("tokens", min=2, max=100_000)},)
        torch.onnx.export(
            module,
            (latents,),
            path,
            dynamo=True,
            opset_version=20,
            dynamic_shapes=shapes,
            verbose=False,
        )
        return
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    if step == "run":
        latents = torch.randn(1, width, tokens, generator=generator)
        session.run(None, {"latents": latents.numpy()})
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    """Command line: see the top of this file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="folder or Hub id of a tokenizer")
    parser.add_argument(
        "--inputs", help="folder of images or recordings that it was not trained on"
    )
    parser.add_argument("--count", type=int, default=20, help="how many of them")
    parser.add_argument("--ways", default=",".join(WAYS), help="which ways, with commas between")
    parser.add_argument("--code-model", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--memory-of", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory_of:
        step, path, *sizes = options.memory_of
        memory_of(step, path, *map(int, sizes))
    elif options.memory:
        memory()
    elif options.code_model:
        code_model()
    elif options.model and options.inputs:
        table(options)
    else:
        parser.error("give a model and --inputs, or --code-model, or --memory")


if __name__ == "__main__":
    main()
