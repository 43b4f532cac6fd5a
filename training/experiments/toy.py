"""Claim (j): the paper's two-dimensional toy. Disjoint optimisation moves the codes that are picked, joint all.

python -m training.experiments.toy

The same points, the same codes at the start. Plain VQ trains the codes themselves; SimVQ freezes them and
trains W and b alone, so that the gradient of one picked code moves every other.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.animation import PillowWriter
from matplotlib.collections import LineCollection
from torch import Tensor
from tqdm.auto import tqdm

from modeling_simvq import SimVQ
from training.experiments.report import new_figure, publish, settings_hash, with_deviation
from training.experiments.runs import REPOSITORY

SYSTEMS = {
    "plain VQ: codes are trained (disjoint)": {"train_basis": True, "train_projection": False},
    "SimVQ: W is trained (joint)": {},
}
CODES, POINTS, STEPS, LEARNING_RATE = 64, 1024, 400, 0.5
SHOWN = (0, 10, 50, 400)
FRAMES = 50
TRAIL = 50  # steps that a code is followed back


def targets(seed: int) -> Tensor:
    """Points (N, 2): a tilted, elongated cloud some way from the origin, where the codes begin."""
    generator = torch.Generator().manual_seed(seed)
    shape = torch.tensor([[1.5, 0.5], [0.0, 0.6]])
    return torch.randn(POINTS, 2, generator=generator) @ shape + torch.tensor([3.0, 2.0])


def train(options: dict, points: Tensor, seed: int) -> dict:
    """Codes over the steps, (STEPS + 1, K, 2), with utilisation and mean squared error of each step."""
    torch.manual_seed(seed)
    start = SimVQ(CODES, 2)
    torch.manual_seed(seed)
    quantizer = SimVQ(CODES, 2, **options)
    if options:
        quantizer.basis.data.copy_(start.codebook().detach())  # the codes that SimVQ starts from
    optimizer = torch.optim.SGD(
        [p for p in quantizer.parameters() if p.requires_grad], lr=LEARNING_RATE
    )
    path, utilisation, error = [], [], []
    for _ in tqdm(range(STEPS + 1), leave=False, unit="step"):
        path.append(quantizer.codebook().detach().clone())
        quantized, picked, loss = quantizer(points.T[None])
        utilisation.append(len(picked.unique()) / CODES)
        error.append(float((quantized.detach()[0].T - points).square().sum(dim=1).mean()))
        optimizer.zero_grad()
        loss.backward()  # the points do not move: only the codebook's half of the loss has a gradient
        optimizer.step()
    return {"path": torch.stack(path), "utilisation": utilisation, "error": error}


def draw(axis, points: Tensor, found: dict, step: int) -> None:
    """Points and codes of one step; picked codes are filled."""
    codes = found["path"][step]
    picked = torch.zeros(CODES, dtype=torch.bool)
    picked[torch.cdist(points, codes).argmin(dim=1)] = True
    axis.scatter(*points.T, s=3, color="0.8", linewidths=0)
    trails = found["path"][max(0, step - TRAIL) : step + 1].transpose(0, 1)  # (K, steps, 2)
    axis.add_collection(LineCollection(trails.numpy(), colors="C0", alpha=0.35, linewidths=0.8))
    axis.scatter(*codes[~picked].T, s=16, facecolors="none", edgecolors="C3", linewidths=0.8)
    axis.scatter(*codes[picked].T, s=16, color="C0", linewidths=0)
    axis.set(xlim=(-3, 8), ylim=(-2.5, 6), xticks=[], yticks=[], aspect="equal")


def animate(points: Tensor, found: dict[str, dict], path: Path) -> None:
    """Both systems side by side; early steps, where most happens, take most frames."""
    figure, axes = new_figure(2)
    frames = sorted({round(STEPS * (n / FRAMES) ** 2) for n in range(FRAMES + 1)})

    writer = PillowWriter(fps=8)
    writer.setup(figure, path, dpi=80)
    for step in tqdm(frames, desc="animation", unit="frame"):
        for axis, (name, one) in zip(axes, found.items(), strict=True):
            axis.clear()
            draw(axis, points, one, step)
            axis.set_title(name, fontsize=9)
            used = one["utilisation"][step]
            axis.set_xlabel(f"step {step}: {used:.0%} of the codes picked", fontsize=9)
        writer.grab_frame()
    writer.finish()


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", default=str(REPOSITORY / "docs/results/toy"))
    parser.add_argument(
        "--seeds", default="0,1,2,3,4", help="of points and codes; the first is drawn"
    )
    known = parser.parse_args(arguments)
    output = Path(known.output)
    output.mkdir(parents=True, exist_ok=True)
    seeds = [int(seed) for seed in known.seeds.split(",")]
    runs, drawn = [], {}
    for seed in tqdm(seeds, desc="toy", unit="seed"):
        points = targets(seed)
        for name, options in SYSTEMS.items():
            found = train(options, points, seed)
            steps = {
                str(step): {key: found[key][step] for key in ("utilisation", "error")}
                for step in SHOWN
            }
            settings = {"options": options, "codes": CODES, "points": POINTS}
            settings |= {"learning_rate": LEARNING_RATE, "steps": STEPS}
            key = settings_hash(settings | {"seed": seed})
            one = {"variant": name, "seed": seed, "hash": key, "settings": settings}
            runs.append(one | {"steps": steps})
            if seed == seeds[0]:
                drawn[name] = found
    animate(targets(seeds[0]), drawn, output / "animation.gif")
    figure, axes = new_figure(len(SHOWN), rows=2)
    for row, (name, found) in zip(axes, drawn.items(), strict=True):
        for axis, step in zip(row, SHOWN, strict=True):
            draw(axis, targets(seeds[0]), found, step)
            axis.set_title(f"step {step}: {found['utilisation'][step]:.0%} picked", fontsize=9)
        row[0].set_ylabel(name.replace(": ", ":\n"), fontsize=9)
    rows = ["| system | step | codes picked | mean squared error |", "|---|---|---|---|"]
    for name in SYSTEMS:
        for step in SHOWN:
            group = [run["steps"][str(step)] for run in runs if run["variant"] == name]
            used, error = (
                with_deviation([one[k] for one in group], "{:.3f}")
                for k in ("utilisation", "error")
            )
            rows.append(f"| {name} | {step} | {used} | {error} |")
    text = (
        "Points in grey, codes that are nearest to some point in blue, others in red; lines are the way "
        f"of their last {TRAIL} steps. The points do not move "
        "and both systems start from the same codes. The animation is animation.gif.\n\n"
        "![](animation.gif)"
    )
    scale = (
        f"Scale: {CODES} codes, {POINTS:,} points, gradient descent with learning rate {LEARNING_RATE}, "
        f"seeds {known.seeds}; mean ± standard deviation over them."
    )
    publish(output, {"runs": runs}, "Disjoint and joint optimisation", text, rows, figure, scale)


if __name__ == "__main__":
    main()
