"""Remedies for latents and codebooks of few dimensions, side by side on one trunk.

python -m training.experiments.remedies dataset=path/to/pictures --seeds 0,1,2
python -m training.experiments.remedies --task speech dataset=path/to/recordings --seeds 0,1,2

Each is an option of the trainers: decorrelation_weight (DimVQ's covariance form), a first phase without
quantization (arXiv 2605.06870), whitened latents, a larger projector, the rotation trick. All runs are of one
length.
"""

import argparse

from training.experiments.bars import draw_bars
from training.experiments.report import table, write
from training.experiments.runs import parse_plan, run_all
from training.experiments.tasks import TASKS

COLUMNS = ["rank_latents", "rank_codebook", "train_utilisation", "perplexity"]
QUALITY = {"images": ["psnr", "lpips_alex"], "speech": ["mel_distance", "stoi"]}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--task", default="images", choices=sorted(TASKS))
    known, words = parser.parse_known_args()
    name = "remedies" if known.task == "images" else f"remedies_{known.task}"
    plan = parse_plan(name, __doc__, [65536], words, known.task)
    # As published, whatever the configuration does about it.
    plan.base.update(whiten_latents=False, codes_from_latents=False, autoencoder_steps=0)
    width, phase = plan.base.get("codebook_dim", 32), plan.base["max_steps"] // 5
    remedies = {
        "SimVQ": {},
        "decorrelation 0.1": {"decorrelation_weight": 0.1},
        "decorrelation 1": {"decorrelation_weight": 1.0},
        f"{phase} steps without quantization first": {"autoencoder_steps": phase},
        "whitened latents": {"whiten_latents": True},
        "projector with a hidden layer": {
            "quantizer_options": {"projection_hidden_dim": 4 * width}
        },
        "rotation trick": {"quantizer_options": {"rotation_trick": True}},
    }
    variants = {}
    for size in plan.sizes:
        for remedy, changes in remedies.items():
            variants[f"{remedy}, K = {size:,}"] = {"codebook_size": size, **changes}
    runs = run_all(plan, variants)
    text = "Ranks are effective ranks, of latents of the training data and of the codebook."
    rows = table(runs, COLUMNS + QUALITY[known.task], "run")
    write(plan, runs, "Remedies for few dimensions", text, rows, draw_bars(runs))


if __name__ == "__main__":
    main()
