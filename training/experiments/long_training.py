"""Claim (f): ten times longer training: does the rank of W, the use of the codes or the loss drift?

python -m training.experiments.long_training dataset=path/to/pictures
"""

from training.experiments.report import COLUMNS, by_variant, new_figure, table, write
from training.experiments.runs import parse_plan, run_all

LONGER = 10


def main() -> None:
    """Command line."""
    plan = parse_plan("long_training", __doc__, [8192])
    steps, every = plan.base["max_steps"], plan.base["validate_every"]
    longer = {"max_steps": LONGER * steps, "validate_every": LONGER * every}
    variants = {}
    for size in plan.sizes:
        for name, options in (
            ("SimVQ", {}),
            ("plain VQ", {"train_basis": True, "train_projection": False}),
        ):
            changes = {"codebook_size": size, "quantizer_options": options}
            variants[f"{name}, K = {size:,}, {steps:,} steps"] = changes
            variants[f"{name}, K = {size:,}, {LONGER * steps:,} steps"] = changes | longer
    runs = run_all(plan, variants)
    figure, axes = new_figure(3)
    for axis, metric in zip(axes, ("rank_codebook", "perplexity", "psnr"), strict=True):
        for name, group in by_variant(runs).items():
            if f"{LONGER * steps:,} steps" in name:
                history = [figures for run in group for figures in run.get("history", [])]
                points = [(figures["step"], figures[metric]) for figures in history]
                if points:
                    axis.plot(*zip(*points, strict=True), marker=".", label=name)
        axis.set(xlabel="step", title=COLUMNS[metric][0])
        axis.grid(alpha=0.3)
    axes[1].set_yscale("log")
    axes[0].legend(fontsize=7)
    text = f"The same training, and one that is {LONGER} times longer."
    metrics = ["train_utilisation", "perplexity", "psnr", "ssim", "rank_w", "rank_codebook"]
    write(plan, runs, "Long training", text, table(runs, metrics, "run"), figure)


if __name__ == "__main__":
    main()
