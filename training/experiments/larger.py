"""Claim (e): codebooks beyond the paper's, 2^19 and 2^20 codes.

python -m training.experiments.larger dataset=path/to/pictures
"""

from training.experiments.bars import draw_bars
from training.experiments.report import table, write
from training.experiments.runs import parse_plan, run_all


def main() -> None:
    """Command line."""
    plan = parse_plan("larger", __doc__, [65536, 262144, 1 << 19, 1 << 20])
    runs = run_all(plan, {f"SimVQ, K = {size:,}": {"codebook_size": size} for size in plan.sizes})
    counted = [
        f"K = {run['settings']['codebook_size']:,}: {run['metrics']['train_tokens_per_code']:.1f}"
        for run in runs
        if "metrics" in run
    ]
    text = (
        "No codebook can use more codes than there are tokens. Tokens of training pictures per code, over "
        f"which the first column is counted: {'; '.join(counted)}."
    )
    metrics = ["train_utilisation", "perplexity", "psnr", "ssim", "lpips_alex", "rank_w"]
    rows = table(runs, metrics, "system")
    write(plan, runs, "Larger codebooks", text, rows, draw_bars(runs))


if __name__ == "__main__":
    main()
