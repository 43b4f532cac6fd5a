"""Claim (a) for speech: small tokenizers whose codes are all in use, and what it takes.

python -m training.experiments.speech dataset=path/to/recordings --seeds 0,1,2

One model, loss and number of steps; codes are counted over all training recordings.
"""

from training.experiments.report import NAMES, by_variant, mean, new_figure, table, write
from training.experiments.runs import parse_plan, run_all

# What of the remedies is left out, and what is then left of the name.
VARIANTS = {
    "whitened latents, codes drawn from them": {},
    "whitened latents, C Gaussian": {"codes_from_latents": False},
    "codes drawn from latents": {"whiten_latents": False},
    "as published": {"whiten_latents": False, "codes_from_latents": False, "autoencoder_steps": 0},
}


def main() -> None:
    """Command line."""
    plan = parse_plan("speech", __doc__, [1024, 8192], task="speech")
    variants = {}
    for size in plan.sizes:
        for name, changes in VARIANTS.items():
            variants[f"SimVQ, K = {size:,}, {name}"] = changes | {"codebook_size": size}
        # It has no C to draw; its latents are whitened all the same.
        changes = {"quantizer": "vq", "codebook_size": size, "codes_from_latents": False}
        variants[f"{NAMES['vq']}, K = {size:,}, whitened latents"] = changes
    runs = run_all(plan, variants)
    groups = by_variant(runs)
    figure, axes = new_figure(len(plan.sizes), height=2.6)
    axes = axes if len(plan.sizes) > 1 else [axes]
    for axis, size in zip(axes, plan.sizes, strict=True):
        shown = [name for name in groups if f"K = {size:,}," in name]
        values = [mean(groups[name], "train_utilisation") or 0.0 for name in shown]
        axis.barh([name.replace(f", K = {size:,}", "") for name in shown], values)
        axis.invert_yaxis()
        axis.set(xlim=(0, 1), title=f"codes used of {size:,}")
    text = (
        "Codes in use of small speech tokenizers: the same model, trainer, recordings, steps and seeds; what "
        "differs is how quantization begins."
    )
    columns = ["train_utilisation", "train_perplexity", "utilisation", "mel_distance", "stoi"]
    write(plan, runs, "Speech", text, table(runs, columns, "system"), figure)


if __name__ == "__main__":
    main()
