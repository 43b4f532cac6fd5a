"""Claim (i): a first phase of the autoencoder without quantization, on and off.

python -m training.experiments.warmup dataset=path/to/pictures

After the phase SimVQ's codes start where the latents are (training/codebook/start.py); plain VQ has no W to do
that with.
"""

from training.experiments.bars import draw_bars
from training.experiments.report import table, write
from training.experiments.runs import parse_plan, run_all


def main() -> None:
    """Command line."""
    plan = parse_plan("warmup", __doc__, [65536])
    phase = plan.base["max_steps"] // 5
    variants = {}
    for size in plan.sizes:
        for name, options in (
            ("SimVQ", {}),
            ("plain VQ", {"train_basis": True, "train_projection": False}),
        ):
            changes = {"codebook_size": size, "quantizer_options": options}
            variants[f"{name}, K = {size:,}"] = changes
            warm = changes | {"autoencoder_steps": phase}
            variants[f"{name}, K = {size:,}, {phase} steps first"] = warm
    runs = run_all(plan, variants)
    text = f"All runs are of one length; with the phase, its first {phase} steps train without quantization."
    rows = table(runs, ["train_utilisation", "perplexity", "psnr", "ssim", "rank_w"], "run")
    write(plan, runs, "Autoencoder warm-up", text, rows, draw_bars(runs))


if __name__ == "__main__":
    main()
