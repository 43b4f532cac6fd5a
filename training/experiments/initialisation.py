"""Claim (d): how C is initialised: normal at several scales, uniform, orthogonal, k-means, external features.

python -m training.experiments.initialisation dataset=path/to/pictures codebook_features=features.safetensors

k-means takes the latents that the untrained encoder gives for training images. The features are those of
training/external_features.py; without them that row is left out.
"""

import torch
from accelerate.utils import set_seed
from safetensors.torch import save_file
from sklearn.cluster import MiniBatchKMeans

from modeling_simvq import SimVQImageModel
from training.data.images import build_image_dataloader, to_values
from training.experiments.bars import draw_bars
from training.experiments.report import table, write
from training.experiments.runs import Plan, parse_plan, run_all
from training.experiments.tasks import TASKS
from training.runtime.settings import build_settings

SCALES = (0.01, 0.1, 10.0, 100.0)


def save_scaled(plan: Plan, size: int, scale: float) -> str:
    """A file of C ~ N(0, scale^2 / d), written if runs are to be started."""
    path = plan.work / f"normal_{scale:g}_{size}.safetensors"
    if not plan.start:
        return str(path)
    width = plan.base["codebook_dim"]
    generator = torch.Generator().manual_seed(plan.seeds[0])
    basis = torch.randn(size, width, generator=generator) * scale / width**0.5
    save_file({"features": basis}, path)
    return str(path)


@torch.no_grad()
def save_kmeans(plan: Plan, size: int) -> str:
    """A file of the K means of latents of an untrained encoder, written if runs are to be started."""
    path = plan.work / f"kmeans_{size}.safetensors"
    if not plan.start:
        return str(path)
    groups = build_settings(TASKS[plan.task].groups, plan.base | {"codebook_size": size})
    set_seed(plan.seeds[0])
    model = SimVQImageModel(groups["model"].config()).eval()
    data = groups["data"]
    data.max_validation_samples = 4096
    loader = build_image_dataloader(data, data.train_split, batch_size=64, train=False, seed=0)
    latents = torch.cat([model.encoder(to_values(batch["pixel_values"])) for batch in loader])
    rows = latents.movedim(1, -1).flatten(0, 2)
    means = MiniBatchKMeans(
        size, init="random", n_init=1, batch_size=8192, max_iter=3, random_state=plan.seeds[0]
    ).fit(rows.numpy())
    save_file({"features": torch.from_numpy(means.cluster_centers_).float().contiguous()}, path)
    return str(path)


def main() -> None:
    """Command line."""
    plan = parse_plan("initialisation", __doc__, [8192])
    features = plan.base.pop("codebook_features", None)
    plan.work.mkdir(parents=True, exist_ok=True)
    variants = {}
    for size in plan.sizes:
        starts = {
            "normal, variance 1/d (the paper's)": {},
            "uniform, variance 1/d": {"quantizer_options": {"basis_init": "uniform"}},
            "orthogonal": {"quantizer_options": {"basis_init": "orthogonal"}},
            **{
                f"normal, {scale:g} times as wide": {
                    "codebook_features": save_scaled(plan, size, scale)
                }
                for scale in SCALES
            },
            "k-means of latents": {"codebook_features": save_kmeans(plan, size)},
        }
        if features:
            starts["external features"] = {"quantizer": "lc", "codebook_features": features}
        for name, changes in starts.items():
            variants[f"{name}, K = {size:,}"] = {"codebook_size": size} | changes
    runs = run_all(plan, variants)
    text = "The basis C is frozen in every row, and W starts as any linear layer of torch does."
    rows = table(runs, ["train_utilisation", "perplexity", "psnr", "ssim", "rank_w"], "C")
    write(plan, runs, "Initialisation of C", text, rows, draw_bars(runs))


if __name__ == "__main__":
    main()
