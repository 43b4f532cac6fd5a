"""SimVQ, its successors and the remedies for codebooks of few dimensions, side by side on one trunk.

python -m training.experiments.remedies dataset=path/to/pictures --seeds 0,1,2
python -m training.experiments.remedies --task speech dataset=path/to/recordings --seeds 0,1,2 max_steps=1000

Each is an option of the trainers or a quantizer of the models (docs/successors.md). All runs are of one length.
"""

import argparse

from training.experiments.bars import draw_bars
from training.experiments.report import table, write
from training.experiments.runs import parse_plan, run_all

COLUMNS = ["rank_latents", "rank_codebook", "train_utilisation", "train_perplexity"]
QUALITY = {"images": ["psnr", "ssim", "lpips_alex"], "speech": ["mel_distance", "pesq", "stoi"]}
SIZES = {"images": 8192, "speech": 1024}


def remedies(steps: int, width: int) -> dict[str, dict]:
    """Return what each changes in the settings of a run.

    Args:
        steps: of the run.
        width: of the codes.
    """
    phase, often = max(1, steps // 5), max(1, steps // 20)
    return {
        "SimVQ": {},
        "covariance penalty (DimVQ), 0.1": {"decorrelation_weight": 0.1},
        "covariance penalty (DimVQ), 1": {"decorrelation_weight": 1.0},
        "Gram penalty (DimVQ), 0.001": {"gram_weight": 1e-3},
        f"autoencoder for {phase} steps": {"autoencoder_steps": phase},
        "autoencoder until it pays no more": {
            "autoencoder_steps": max(1, steps // 2),
            "end_phase_early": True,
        },
        f"autoencoder for {phase} steps, codes from latents": {
            "autoencoder_steps": phase,
            "codes_from_latents": True,
        },
        "whitened latents": {"whiten_latents": True},
        "whitened latents, codes from latents": {
            "whiten_latents": True,
            "autoencoder_steps": phase,
            "codes_from_latents": True,
        },
        "projector with a hidden layer": {
            "quantizer_options": {"projection_hidden_dim": 4 * width}
        },
        "rotation trick": {"quantizer_options": {"rotation_trick": True}},
        "FVQ": {"quantizer": "fvq"},
        "NSVQ": {
            "quantizer": "vq",
            "drift_weight": 0.01,
            "replace_unused_every": often,
            "encoder_steps": max(1, steps * 3 // 5),
        },
        "DiVeQ": {"quantizer": "diveq", "replace_unused_every": often},
        "IBQ": {"quantizer": "ibq"},
        "VQGAN": {"quantizer": "vq"},
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--task", default="images", choices=sorted(QUALITY))
    known, words = parser.parse_known_args()
    name = "remedies" if known.task == "images" else f"remedies_{known.task}"
    plan = parse_plan(name, __doc__, [SIZES[known.task]], words, known.task, more=parser)
    # As published, whatever the configuration does about it.
    plan.base.update(whiten_latents=False, codes_from_latents=False, autoencoder_steps=0)
    width = plan.base.get("codebook_dim", 32)
    variants = {}
    for size in plan.sizes:
        for remedy, changes in remedies(plan.base["max_steps"], width).items():
            variants[f"{remedy}, K = {size:,}"] = {"codebook_size": size, **changes}
    runs = run_all(plan, variants)
    text = (
        "Ranks are effective ranks, of latents of the training data and of the codebook. An autoencoder is the "
        "model without its quantizer, in the first steps of a run; runs are of one length, that phase included."
    )
    rows = table(runs, COLUMNS + QUALITY[known.task], "run")
    panels = ("rank_codebook", "rank_latents", "train_utilisation", QUALITY[known.task][0])
    write(plan, runs, "Remedies and successors", text, rows, draw_bars(runs, panels))


if __name__ == "__main__":
    main()
