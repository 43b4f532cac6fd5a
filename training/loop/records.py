"""Figures and pictures of a run: means over a window, trackers, PNG files."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor
from torchvision.utils import save_image


class FigureMeans:
    """Means of figures and sums of counts over a window, kept on the device until they are read."""

    def __init__(self):
        self._sums: dict[str, Tensor] = {}
        self._numbers: dict[str, Tensor | float] = {}
        self._counts: dict[str, Tensor] = {}

    def add(self, figures: dict[str, Tensor], weights: dict[str, Tensor] | None = None) -> None:
        """Add the figures of one forward pass.

        Args:
            weights: of figures that do not count as much as the same of other passes, by name.
        """
        for name, value in figures.items():
            weight = (weights or {}).get(name, 1)
            value = value.detach().float() * weight
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._numbers[name] = self._numbers.get(name, 0) + weight

    def count(self, name: str, number: Tensor) -> None:
        """Add to a count."""
        self._counts[name] = self._counts[name] + number if name in self._counts else number

    def read(self, accelerator: Accelerator) -> tuple[dict[str, float], dict[str, int]]:
        """Means and counts over all ranks since the last read; no means if every step was skipped."""
        names, device, figures = sorted(self._sums), accelerator.device, {}
        if names:
            sums = [self._sums[name].to(device) for name in names]
            numbers = [
                torch.as_tensor(self._numbers[name], dtype=torch.float32, device=device)
                for name in names
            ]
            sums, numbers = accelerator.reduce(
                torch.stack([torch.stack(sums), torch.stack(numbers)]), reduction="sum"
            )
            figures = dict(zip(names, (sums / numbers).tolist(), strict=True))
        counts = {
            name: int(accelerator.reduce(number.to(device, copy=True), reduction="sum"))
            for name, number in sorted(self._counts.items())
        }
        self.__init__()
        return figures, counts

    def state_dict(self) -> dict:
        return {"sums": self._sums, "numbers": self._numbers, "counts": self._counts}

    def load_state_dict(self, state: dict) -> None:
        self._sums, self._numbers = state["sums"], state["numbers"]
        self._counts = state["counts"]


def total_loss(figures: dict[str, float]) -> float:
    """The model's loss among a report's figures; NaN if every step was skipped."""
    return figures.get("generator/total", float("nan"))


def loss_line(figures: dict[str, float]) -> str:
    """All losses of a report, for a plain log: "loss 0.531 (reconstruction 0.21), discriminator 1.9 (...)"."""
    parts = []
    for side in ("generator", "discriminator"):
        terms = {
            name.removeprefix(f"{side}/"): value
            for name, value in figures.items()
            if name.startswith(f"{side}/")
        }
        if not terms and side == "discriminator":
            continue
        total = terms.pop("total", float("nan"))
        rest = ", ".join(f"{name} {value:.4g}" for name, value in terms.items())
        name = "loss" if side == "generator" else side
        parts.append(f"{name} {total:.4g}" + (f" ({rest})" if rest else ""))
    return ", ".join([*parts, f"learning rate {figures['run/learning_rate']:.3g}"])


@contextmanager
def naming(folder: Path) -> Iterator[None]:
    """A full disk and the like end in a message that says where; writers themselves often do not.

    Raises:
        OSError: naming the folder and the reason.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"cannot write to {folder}: {getattr(error, 'strerror', None) or error}"
        ) from error


def write_figures(output_dir: Path, step: int, figures: dict) -> None:
    """Append a validation's figures to figures.jsonl. They are on the disk before the next checkpoint is."""
    with (output_dir / "figures.jsonl").open("a") as lines:
        lines.write(json.dumps({"step": step, **figures}) + "\n")
        lines.flush()
        os.fsync(lines.fileno())


def drop_figures_after(output_dir: Path, step: int) -> None:
    """Cut figures.jsonl back to a step, because a resumed run writes the later lines again."""
    path = output_dir / "figures.jsonl"
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue  # a line that was cut off when the run was killed
    beside = path.with_name(".figures.jsonl")
    with beside.open("w") as lines:
        lines.writelines(kept)
        lines.flush()
        os.fsync(lines.fileno())
    os.replace(beside, path)


def write_pictures(
    output_dir: Path, step: int, pictures: dict[str, Tensor], trackers: list
) -> None:
    """Save pictures (3, H, W) in [0, 1] as PNG and hand them to the trackers that take pictures."""
    for name, picture in pictures.items():
        path = output_dir / name / f"step-{step:08d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_image(picture, path)
        for tracker in trackers:
            if hasattr(tracker, "log_images"):
                batch = picture.permute(1, 2, 0).cpu().numpy()[None]
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({name: batch}, step=step, **layout)


def write_sounds(
    output_dir: Path, step: int, sounds: dict[str, Tensor], sampling_rate: int, trackers: list
) -> None:
    """Save sounds (samples,) in [-1, 1] as 16-bit WAV and hand them to the trackers that take sounds."""
    if not sounds:
        return
    import soundfile  # not needed to train on pictures

    for name, sound in sounds.items():
        path = output_dir / "sounds" / f"step-{step:08d}-{name}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        sound = sound.float().cpu().nan_to_num().clamp(-1, 1)
        soundfile.write(path, sound.numpy(), sampling_rate, subtype="PCM_16")
        for tracker in trackers:
            if tracker.name == "tensorboard":
                tracker.tracker.add_audio(name, sound[None], step, sampling_rate)
            elif tracker.name == "wandb":
                import wandb

                audio = wandb.Audio(sound.numpy(), sample_rate=sampling_rate)
                tracker.tracker.log({name: audio}, step=step)
