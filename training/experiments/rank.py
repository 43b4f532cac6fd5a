"""Claim (b): how the rank of W develops over training, and with the size of the codebook.

python -m training.experiments.rank dataset=path/to/pictures

The rank is effective_rank of training/codebook/usage.py: exp of the entropy of the normalised singular values.
"""

from training.experiments.report import by_variant, new_figure, table, write
from training.experiments.runs import parse_plan, run_all


def main() -> None:
    """Command line."""
    plan = parse_plan("rank", __doc__, [1024, 8192, 65536, 262144])
    variants = {f"SimVQ, K = {size:,}": {"codebook_size": size} for size in plan.sizes}
    runs = run_all(plan, variants)
    figure, (left, right) = new_figure(2)
    for name, group in by_variant(runs).items():
        for number, run in enumerate(group):
            steps = [figures["step"] for figures in run.get("history", [])]
            for axis, metric in ((left, "rank_w"), (right, "utilisation")):
                values = [figures[metric] for figures in run.get("history", [])]
                color = f"C{list(variants).index(name)}"
                axis.plot(steps, values, color=color, label=None if number else name)
    left.set(xlabel="step", title="effective rank of W", ylim=(0, None))
    right.set(xlabel="step", title="codes used by the validation pictures", yscale="log")
    left.legend(fontsize=8)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    text = (
        "W starts with full rank and concentrates on the directions that the latents need. "
        f"It is {plan.base['codebook_dim']} x {plan.base['codebook_dim']}. "
        "Few validation pictures bound the right panel: a codebook cannot use more codes than there are tokens."
    )
    rows = table(runs, ["rank_w", "rank_codebook", "train_utilisation", "psnr"], "system")
    write(plan, runs, "Rank of W", text, rows, figure)


if __name__ == "__main__":
    main()
