"""Claim (c): which of C and W has to be trained: W alone (SimVQ), C alone (plain VQ), both, or neither.

python -m training.experiments.trained_parts dataset=path/to/pictures

The paper's section 4: with both trained, C goes along and the codes that are not picked stay behind again.
"""

from training.experiments.bars import draw_bars
from training.experiments.report import table, write
from training.experiments.runs import parse_plan, run_all

PARTS = {
    "W alone (SimVQ)": {},
    "C alone (plain VQ)": {"train_basis": True, "train_projection": False},
    "C and W": {"train_basis": True},
    "neither": {"train_projection": False},
}


def main() -> None:
    """Command line."""
    plan = parse_plan("trained_parts", __doc__, [65536])
    variants = {
        f"{name}, K = {size:,}": {"codebook_size": size, "quantizer_options": options}
        for size in plan.sizes
        for name, options in PARTS.items()
    }
    runs = run_all(plan, variants)
    text = "The same start, N(0, 1/d), for C in all four; a W that is not trained is the identity."
    rows = table(
        runs,
        ["train_utilisation", "utilisation", "perplexity", "psnr", "ssim", "rank_codebook"],
        "trained",
    )
    write(plan, runs, "Which part is trained", text, rows, draw_bars(runs))


if __name__ == "__main__":
    main()
