"""Claim (a): a plain codebook collapses as it grows, SimVQ's does not. Seven quantizers, several sizes K.

python -m training.experiments.collapse dataset=path/to/pictures codebook_features=features.safetensors

The features are for VQGAN-LC: python training/external_features.py makes them; without, it is left out.
"""

from modeling_simvq.quantizer_names import PAPER
from training.experiments.bars import draw_bars
from training.experiments.report import NAMES, by_variant, mean, new_figure, table, write
from training.experiments.runs import parse_plan, run_all

PANELS = {
    "train_utilisation": "codes used",
    "train_perplexity": "perplexity",
    "psnr": "PSNR, dB",
}
FSQ_SIZES = {1024: 1000, 8192: 8000, 65536: 64000}


def changes(quantizer: str, size: int, features: str | None) -> dict:
    """Settings of a quantizer at a codebook size."""
    settings = {"quantizer": quantizer, "codebook_size": size}
    if quantizer == "fsq":
        settings["codebook_size"] = FSQ_SIZES.get(size, size)
    if quantizer == "lc":
        settings["codebook_features"] = features
    return settings


def draw(runs: list[dict], systems: list[str], sizes: list[int]):
    """Draw codes in use, perplexity and PSNR over the codebook's size."""
    groups = by_variant(runs)
    figure, axes = new_figure(3)
    for axis, (metric, label) in zip(axes, PANELS.items(), strict=True):
        for name in systems:
            values = [
                mean(groups.get(f"{NAMES[name]}, K = {size:,}", []), metric) for size in sizes
            ]
            points = [(k, v) for k, v in zip(sizes, values, strict=True) if v is not None]
            if points:
                style = {"linewidth": 2.5, "zorder": 3} if name == "simvq" else {"alpha": 0.8}
                axis.plot(*zip(*points, strict=True), marker="o", label=NAMES[name], **style)
        axis.set(xscale="log", xlabel="K, number of codes", title=label)
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylim(-0.03, 1.03)
    axes[1].set_yscale("log")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


def main() -> None:
    """Command line."""
    plan = parse_plan("collapse", __doc__, [1024, 8192, 65536, 262144])
    features = plan.base.pop("codebook_features", None)
    systems = [name for name in PAPER if name != "lc" or features]
    variants = {
        f"{NAMES[name]}, K = {size:,}": changes(name, size, features)
        for size in plan.sizes
        for name in systems
    }
    runs = run_all(plan, variants)
    several = len(plan.sizes) > 1
    figure = draw(runs, systems, plan.sizes) if several else draw_bars(runs, tuple(PANELS))
    text = (
        "Codes in use and quality of reconstruction against the size of the codebook: the same model, trainer, "
        "data, steps and seed, only the quantizer differs."
    )
    rows = table(
        runs,
        ["train_utilisation", "utilisation", "perplexity", "psnr", "ssim", "lpips_alex"],
        "system",
    )
    write(plan, runs, "Collapse of the codebook", text, rows, figure)


if __name__ == "__main__":
    main()
