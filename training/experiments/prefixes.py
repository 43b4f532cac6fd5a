"""Bits and distortion: the first codebooks of one model with several, against single codebooks of as many bits.

python -m training.experiments.prefixes dataset=path/to/pictures --seeds 0,1,2

Q = 4 quantizers of K codes give log2(K), 2, 3 and 4 times as many bits a position, from one training with
quantizer dropout in half of the batches. A single codebook of K^n codes, up to 262,144, gives n times as many
from a training of its own. All begin with a fifth of their steps without quantization, so that every codebook
starts where what it is to code is: later ones of several would have to find it otherwise.
"""

import math

from training.experiments.report import COLUMNS, mean, new_figure, write
from training.experiments.runs import Plan, parse_plan, run_all

QUANTIZERS, MOST_CODES = 4, 262_144
METRICS = ("psnr", "ssim", "lpips_alex")


def variants_of(plan: Plan) -> dict[str, dict]:
    """Return what is trained, by name."""
    variants = {}
    for size in plan.sizes:
        for count in range(1, QUANTIZERS + 1):
            if size**count <= MOST_CODES:
                variants[f"one codebook, K = {size**count:,}"] = {"codebook_size": size**count}
        several = {"codebook_size": size, "num_quantizers": QUANTIZERS}
        for arrangement in ("residual", "grouped"):
            changes = several | {"quantizer_arrangement": arrangement, "quantizer_dropout": 0.5}
            variants[f"{arrangement}, {QUANTIZERS} of K = {size:,}"] = changes
        variants[f"residual without dropout, {QUANTIZERS} of K = {size:,}"] = several
    return variants


def points_of(runs: list[dict]) -> dict[str, dict[float, dict[str, float]]]:
    """Return means over seeds: by kind of model, then by bits a position, then by metric."""
    groups: dict[str, dict[float, list[tuple[dict, str]]]] = {}
    for run in runs:
        settings, name = run["settings"], run["variant"]
        count = settings.get("num_quantizers", 1)
        kind = "one codebook each" if count == 1 else name
        for used in range(1, count + 1):
            bits = used * math.log2(settings["codebook_size"])
            ending = "" if used == count else f"_first_{used}"
            groups.setdefault(kind, {}).setdefault(bits, []).append((run, ending))
    return {
        kind: {
            bits: {
                metric: mean([run for run, _ in found], metric + found[0][1]) or math.nan
                for metric in METRICS
            }
            for bits, found in sorted(points.items())
        }
        for kind, points in groups.items()
    }


def rows_of(points: dict[str, dict[float, dict[str, float]]]) -> list[str]:
    """Return a Markdown table: a row for each kind of model and number of bits."""
    headings = ["model", "bits a position", *(COLUMNS[metric][0] for metric in METRICS)]
    rows = [f"| {' | '.join(headings)} |", "|" + "---|" * len(headings)]
    for kind, by_bits in points.items():
        for bits, figures in by_bits.items():
            cells = [COLUMNS[metric][1].format(figures[metric]) for metric in METRICS]
            rows.append(f"| {kind} | {bits:g} | {' | '.join(cells)} |")
    return rows


def draw(points: dict[str, dict[float, dict[str, float]]]):
    """Draw each metric over bits, a line for each kind of model."""
    figure, axes = new_figure(len(METRICS), height=3.4)
    for axis, metric in zip(axes, METRICS, strict=True):
        for kind, by_bits in points.items():
            values = [figures[metric] for figures in by_bits.values()]
            axis.plot(list(by_bits), values, marker="o", markersize=4, label=kind)
        axis.set_title(COLUMNS[metric][0], fontsize=10)
        axis.set_xlabel("bits a position", fontsize=9)
        axis.tick_params(labelsize=8)
    if points:
        axes[0].legend(fontsize=7)
    return figure


def main() -> None:
    """Command line."""
    plan = parse_plan("prefixes", __doc__, [16])
    plan.base.setdefault("autoencoder_steps", plan.base["max_steps"] // 5)
    runs = run_all(plan, variants_of(plan))
    points = points_of(runs)
    text = (
        "Every line but the first is one model, and its points the first 1 to 4 of its codebooks; every point "
        "of the first line is a model of its own. All were trained for as many steps."
    )
    write(plan, runs, "Bits and distortion", text, rows_of(points), draw(points))


if __name__ == "__main__":
    main()
