"""Tables and figures of the experiments."""

import hashlib
import json
import platform
import statistics
import sys
from pathlib import Path

import matplotlib
import torch

import modeling_simvq
from training.experiments.runs import Plan

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NAMES = {
    "simvq": "SimVQ",
    "vq": "VQGAN",
    "vq_ema": "VQGAN-EMA",
    "fc": "VQGAN-FC",
    "fsq": "FSQ",
    "lfq": "LFQ",
    "lc": "VQGAN-LC",
}
# Metric: heading and format.
COLUMNS = {
    "train_utilisation": ("codes used (training data)", "{:.1%}"),
    "train_perplexity": ("perplexity (training)", "{:,.0f}"),
    "mel_distance": ("log-mel distance", "{:.3f}"),
    "stoi": ("STOI", "{:.3f}"),
    "pesq": ("PESQ", "{:.2f}"),
    "utilisation": ("codes used (validation)", "{:.1%}"),
    "perplexity": ("perplexity", "{:,.0f}"),
    "psnr": ("PSNR, dB", "{:.2f}"),
    "ssim": ("SSIM", "{:.3f}"),
    "lpips_alex": ("LPIPS (AlexNet)", "{:.3f}"),
    "rank_w": ("effective rank of W", "{:.1f}"),
    "rank_latents": ("effective rank of the latents", "{:.1f}"),
    "rank_codebook": ("effective rank of the codebook", "{:.1f}"),
    "bits": ("bits an image", "{:.0f}"),
    "bits_per_code": ("bits a code", "{:.2f}"),
    "neighbour_bits": ("bits a code by analyze_codebook", "{:.2f}"),
    "share_of_capacity": ("share of log2 K", "{:.1%}"),
    "train_bits": ("bits of a training image", "{:.0f}"),
    "gfid": ("gFID", "{:.1f}"),
    "floor_fid": ("FID of decoded training images", "{:.1f}"),
}


def final(run: dict, metric: str) -> float | None:
    """A metric of a run, or the last value that its validations found; None if it has none."""
    value = run.get("metrics", {}).get(metric)
    if value is None and run.get("history"):
        value = run["history"][-1].get(metric)
    return value


def mean(runs: list[dict], metric: str) -> float | None:
    """Mean over runs that have the metric."""
    values = [value for run in runs if (value := final(run, metric)) is not None]
    return statistics.fmean(values) if values else None


def by_variant(runs: list[dict]) -> dict[str, list[dict]]:
    """Runs of all seeds under the variant's name, in order."""
    grouped: dict[str, list[dict]] = {}
    for run in runs:
        grouped.setdefault(run["variant"], []).append(run)
    return grouped


def table(runs: list[dict], metrics: list[str], heading: str) -> list[str]:
    """Markdown rows, one a variant; several seeds give mean ± standard deviation."""
    lines = [
        "| " + " | ".join([heading, *(COLUMNS[m][0] for m in metrics), "run"]) + " |",
        "|" + "---|" * (len(metrics) + 2),
    ]
    for name, group in by_variant(runs).items():
        cells = [_cell(group, metric) for metric in metrics]
        hashes = ", ".join(f"`{run['hash']}`" for run in group)
        if errors := [run["error"] for run in group if "error" in run]:
            hashes += f" failed: {errors[0]}"
        lines.append("| " + " | ".join([name, *cells, hashes]) + " |")
    return lines


def _cell(group: list[dict], metric: str) -> str:
    values = [value for run in group if (value := final(run, metric)) is not None]
    return with_deviation(values, COLUMNS[metric][1]) if values else ""


def with_deviation(values: list[float], form: str) -> str:
    """Mean of values in a format, with ± the standard deviation where there are several."""
    text = form.format(statistics.fmean(values))
    return f"{text} ± {form.format(statistics.stdev(values))}" if len(values) > 1 else text


def write(plan: Plan, runs: list[dict], title: str, text: str, rows: list[str], figure) -> None:
    """Publish an experiment of trainings; what is there stays if none of them is done."""
    if not runs:
        sys.exit(f"error: no run in {plan.work} is finished")
    publish(plan.output, {"runs": runs}, title, text, rows, figure, scale(plan))


def publish(
    output: Path, content: dict, title: str, text: str, rows: list[str], figure, scale: str
) -> None:
    """Write results.json, README.md and figure.png into `output`, and print the table.

    Args:
        content: what results.json holds beside the versions.
        rows: of the table, Markdown.
        scale: the experiment's size, in a sentence.
    """
    output.mkdir(parents=True, exist_ok=True)
    versions = {
        "modeling_simvq": modeling_simvq.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    content = {"versions": versions, **content}
    (output / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    figure.savefig(output / "figure.png", dpi=110, bbox_inches="tight")
    plt.close(figure)
    page = [f"# {title}", "", text, "", *rows, "", "![](figure.png)", "", scale]
    (output / "README.md").write_text("\n".join(page) + "\n")
    print("\n".join(rows))
    print(f"\nresults.json, README.md and figure.png are in {output}")


def settings_hash(settings: dict) -> str:
    """Ten hexadecimal digits of the settings of a run that is not a training of a model (config_hash is)."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]


def scale(plan: Plan) -> str:
    """The size of the experiment in a sentence."""
    base = plan.base
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    if plan.task == "speech":
        samples = f"at {base['sampling_rate']:,} Hz"
        batch = f"{base['batch_size']} crops of {base['clip_seconds']:g} s"
    else:
        samples = f"at {base['resolution']} x {base['resolution']} pixels"
        batch = f"{base['batch_size']} pictures"
    return (
        f"Scale: {Path(base['dataset']).name} {samples}, {base['max_steps']:,} steps of {batch}, codes of "
        f"{base['codebook_dim']} dimensions, seeds {', '.join(map(str, plan.seeds))}, on {where}. "
        "Settings of every run are in results.json, under its hash."
    )


def new_figure(panels: int, height: float = 3.4, rows: int = 1):
    """A figure with panels side by side, in rows."""
    return plt.subplots(rows, panels, figsize=(4.4 * panels, height * rows), layout="constrained")
