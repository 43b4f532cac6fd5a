"""Claim (a) for speech: small tokenizers whose codes are all in use, and what it takes.

python -m training.experiments.speech dataset=path/to/recordings --seeds 0,1,2

One model, loss and number of steps; codes are counted over all training recordings. SimVQ with both remedies
and plain VQ are run with every seed, SimVQ without one of the remedies, or both, with the first.
"""

from dataclasses import replace

from training.experiments.report import NAMES, by_variant, mean, new_figure, table, write
from training.experiments.runs import parse_plan, run_all

REMEDIES = "whitened latents, codes drawn from them"
# What of the remedies is left out, and what is then left of the name.
ABLATIONS = {
    "whitened latents, C Gaussian": {"codes_from_latents": False},
    "codes drawn from latents": {"whiten_latents": False},
    "as published": {"whiten_latents": False, "codes_from_latents": False, "autoencoder_steps": 0},
}


def main() -> None:
    """Command line."""
    plan = parse_plan("speech", __doc__, [1024, 8192], task="speech")
    least = plan.sizes[0]
    repeated = {f"SimVQ, K = {size:,}, {REMEDIES}": {"codebook_size": size} for size in plan.sizes}
    # It has no C to draw; its latents are whitened all the same.
    vq = {"quantizer": "vq", "codebook_size": least, "codes_from_latents": False}
    repeated[f"{NAMES['vq']}, K = {least:,}, whitened latents"] = vq
    once = {
        f"SimVQ, K = {least:,}, {name}": changes | {"codebook_size": least}
        for name, changes in ABLATIONS.items()
    }
    runs = run_all(plan, repeated) + run_all(replace(plan, seeds=plan.seeds[:1]), once)
    groups = by_variant(runs)
    figure, axis = new_figure(1, height=2.6)
    axis.barh(list(groups), [mean(some, "train_utilisation") or 0.0 for some in groups.values()])
    axis.invert_yaxis()
    axis.set(xlim=(0, 1), title="codes in use")
    text = (
        "Codes in use of small speech tokenizers: the same model, trainer, recordings, steps and seeds; what "
        "differs is how quantization begins. Ablations were run with the first seed alone."
    )
    columns = ["train_utilisation", "train_perplexity", "utilisation", "mel_distance", "stoi"]
    write(plan, runs, "Speech", text, table(runs, columns, "system"), figure)


if __name__ == "__main__":
    main()
