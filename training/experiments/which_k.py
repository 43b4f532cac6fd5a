"""Number of codes for generation: tokenizers of several K, and a small code model over each.

python -m training.experiments.which_k dataset=path/to/pictures --seeds 0,1,2

All tokenizers are trained alike, and so are all code models: each code is two factors of about sqrt(K), so that
tables and classifiers stay small at every K. Run after run, the page is written with what there is; the same
command goes on where it stopped, and --finished shows what is done.
"""

import argparse
import math
import sys
from dataclasses import replace

import torch
from torchmetrics.functional import spearman_corrcoef

from training.experiments.code_samples import sample_distances
from training.experiments.report import (
    by_variant,
    final,
    mean,
    new_figure,
    publish,
    scale,
    table,
)
from training.experiments.runs import REPOSITORY, Plan, parse_plan, run_all
from training.experiments.tasks import TASKS
from training.runtime.setting_values import read_yaml
from training.runtime.settings import convert_values

TASK = "code_models"
METRICS = ["train_utilisation", "psnr", "bits", "bits_per_code", "neighbour_bits"]
METRICS += ["share_of_capacity", "train_bits", "gfid", "floor_fid"]
TEXT = (
    "Tokenizers that differ in the number of their codes alone, and a code model over each, of equal size and "
    "training. Bits are of held-out images. FID is of samples against held-out images; decoded training images "
    "say what it would be if the code model were perfect."
)
# What analyze_codebook tells without a code model, and log2 K for comparison.
CHEAP = {
    "uniform_bits": "log2 K alone",
    "frequency_bits": "bits a code by its frequency",
    "neighbour_bits": "bits a code by its frequency and neighbours",
    "told_by_neighbours": "bits that the neighbours tell",
    "unseen": "held-out codes that no other image has",
}


def factors_of(size: int) -> list[int]:
    """Return two factors of K, as near to its square root as they can be."""
    first = next(n for n in range(math.isqrt(size), 0, -1) if size % n == 0)
    return [first, size // first]


def run_part(plan: Plan, code_models: dict) -> tuple[list[dict], list[dict]]:
    """Train the tokenizers of one seed, and a code model over each.

    Args:
        code_models: settings that the code models share.

    Returns:
        Runs of the tokenizers and of the code models, the latter with the figures of their tokenizer too.
    """
    sizes = {f"K = {size:,}": {"codebook_size": size} for size in plan.sizes}
    tokenizers = run_all(plan, sizes, with_model=True)
    done = {run["variant"]: run for run in tokenizers if "metrics" in run}
    base = code_models | {"dataset": plan.base["dataset"]}
    variants = {
        name: {
            "tokenizer": str(plan.work / run["hash"] / "model"),
            "code_factors": factors_of(sizes[name]["codebook_size"]),
        }
        for name, run in done.items()
    }
    models = run_all(replace(plan, base=base, task=TASK), variants)
    for run in models:
        run["tokenizer"] = {
            name: final(done[run["variant"]], name) for name in ("train_utilisation", "psnr")
        }
    return tokenizers, models


def with_tokenizers(models: list[dict]) -> list[dict]:
    """Return runs of code models with all figures that the tables show among their metrics."""
    found = []
    for run in models:
        metrics = dict(run.get("metrics", {}))
        if metrics:
            metrics["bits_per_code"] = metrics["bits"] / len(metrics["bits_by_position"])
            metrics["share_of_capacity"] = metrics["bits_per_code"] / metrics["uniform_bits"]
        if {"gfid", "floor_fid"} <= metrics.keys():
            metrics["gfid_above_floor"] = metrics["gfid"] - metrics["floor_fid"]
        found.append(run | {"metrics": metrics | run["tokenizer"]})
    return found


def rank_table(runs: list[dict]) -> list[str]:
    """Return Markdown rows: whether cheap figures order runs as code models do; none of two runs."""
    results = {"bits": "bits an image", "share_of_capacity": "share of log2 K", "gfid": "gFID"}
    results["gfid_above_floor"] = "gFID above that of decoded training images"
    done = {name: [run["metrics"] for run in runs if name in run["metrics"]] for name in results}
    if len(done["bits"]) < 3:
        return []
    names = [f"{name} ({len(done[key])} runs)" for key, name in results.items()]
    heading = ["rank correlation with", *names]
    rows = ["", f"| {' | '.join(heading)} |", "|" + "---|" * len(heading)]
    for cheap, name in CHEAP.items():
        cells = [_spearman(done[result], cheap, result) for result in results]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return rows


def _spearman(done: list[dict], first: str, second: str) -> str:
    if len(done) < 3 or len({run[first] for run in done}) == 1:  # nothing to order by
        return ""
    pair = (torch.tensor([float(run[name]) for run in done]) for name in (first, second))
    return f"{float(spearman_corrcoef(*pair)):+.2f}"


def draw(runs: list[dict], sizes: list[int]):
    """Draw bits by position, bits against PSNR, FID by K, and the cheap figure against the code models."""
    figure, axes = new_figure(2, rows=2)
    (by_position, rate), (quality, cheap) = axes
    done_runs = by_variant([run for run in runs if "bits" in run["metrics"]])
    groups = {size: done_runs.get(f"K = {size:,}") for size in sizes}
    groups = {size: done for size, done in groups.items() if done}
    for color, (size, done) in enumerate(groups.items()):
        style = {"color": f"C{color}"}
        for name, line in (("bits_by_position", "-"), ("prefix_entropies", ":")):
            curves = torch.tensor([run["metrics"][name] for run in done]).mean(dim=0)
            label = f"K = {size:,}" if line == "-" else None
            by_position.plot(range(1, len(curves) + 1), curves, line, label=label, **style)
        rate.plot(mean(done, "bits"), mean(done, "psnr"), "o", label=f"K = {size:,}", **style)
        points = [
            [final(run, name) for run in done] for name in ("neighbour_bits", "bits_per_code")
        ]
        cheap.plot(*points, "o", label=f"K = {size:,}", **style)
    by_position.plot([], [], ":", color="0.4", label="training images, known by heart")
    by_position.set(xlabel="position, in raster order", title="bits a code, held out")
    by_position.set_ylim(0, None)
    rate.set(xlabel="bits an image, held out", title="PSNR, dB")
    for name, label in (("gfid", "samples"), ("floor_fid", "decoded training images")):
        found = {size: mean(done, name) for size, done in groups.items()}
        found = {size: value for size, value in found.items() if value is not None}
        quality.plot(list(found), list(found.values()), "o-", label=label)
    quality.set(xscale="log", xlabel="K, number of codes", title="FID", ylim=(0, None))
    quality.set_xticks(list(groups), [f"{size:,}" for size in groups])
    quality.minorticks_off()
    quality.set_visible(any("gfid" in run["metrics"] for run in runs))
    cheap.set(xlabel="bits a code by analyze_codebook", title="bits a code, held out, of each run")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    return figure


def main() -> None:
    """Command line."""
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument(
        "--code-models",
        default=str(REPOSITORY / "training" / "configs" / TASKS[TASK].config),
        help="configuration of the code models",
    )
    options, words = own.parse_known_args()
    plan = parse_plan("which_k", __doc__, [4**n for n in range(5, 10)], words, more=own)
    code_models = convert_values(TASKS[TASK].groups, read_yaml(options.code_models))
    tokenizers, models = [], []
    for seed in plan.seeds:
        for first in range(0, len(plan.sizes), plan.jobs):
            part = replace(plan, seeds=[seed], sizes=plan.sizes[first : first + plan.jobs])
            found = run_part(part, code_models)
            tokenizers, models = tokenizers + found[0], models + found[1]
            if plan.start:
                write(plan, code_models, tokenizers, models)
        # Samples last, because they take longest.
        for run in models:
            if run["seed"] == seed:
                add_samples(plan, run)
                if plan.start:
                    write(plan, code_models, tokenizers, models)
    if not models:
        sys.exit(f"error: no code model in {plan.work} is finished")
    if not plan.start:
        write(plan, code_models, tokenizers, models)


def add_samples(plan: Plan, run: dict) -> None:
    """Add what the samples of a code model are like to its metrics."""
    folder = plan.work / run["hash"]
    if "error" not in run and (plan.start or (folder / "samples.json").exists()):
        tokenizer = str(plan.work / run["settings"]["tokenizer"] / "model")
        run["metrics"] |= sample_distances(folder, plan.base["dataset"], tokenizer, run["seed"])


def write(plan: Plan, code_models: dict, tokenizers: list[dict], models: list[dict]) -> None:
    """Publish what there is, small codebooks first."""
    order = {f"K = {size:,}": size for size in plan.sizes}
    runs = sorted(with_tokenizers(models), key=lambda run: order[run["variant"]])
    seeds = sorted({run["seed"] for run in runs})
    publish(
        plan.output,
        {"runs": tokenizers, "code_models": models},
        "Which K for generation",
        TEXT,
        table(runs, METRICS, "tokenizer") + rank_table(runs),
        draw(runs, sorted(plan.sizes)),
        f"{scale(replace(plan, seeds=seeds))} Code models: {code_models['max_steps']:,} steps of "
        f"{code_models['batch_size']} images, {code_models['num_hidden_layers']} layers of width "
        f"{code_models['hidden_size']}.",
    )


if __name__ == "__main__":
    main()
