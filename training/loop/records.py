"""Records of a run's validations: figures, images and audio, in its folder and for the trackers."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor
from torchvision.utils import save_image
from tqdm.auto import tqdm

from training.loop.recipe import Validation


@contextmanager
def naming(folder: Path) -> Iterator[None]:
    """Let errors of writing name the folder, such as a full disk: writers themselves often do not.

    Raises:
        OSError: naming the folder and the reason.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"cannot write to {folder}: {getattr(error, 'strerror', None) or error}"
        ) from error


def write_validation(
    output_dir: Path, step: int, result: Validation, accelerator: Accelerator
) -> None:
    """Record a validation: figures to the trackers and to figures.jsonl, images and audio to files and both.

    Raises:
        OSError: naming the folder and the reason.
    """
    figures = result.figures | result.diagnostics
    scalars = {k: v for k, v in figures.items() if not isinstance(v, list)}
    accelerator.log({f"validation/{k}": v for k, v in scalars.items()}, step=step)
    if not accelerator.is_main_process:
        return
    with naming(output_dir):
        write_figures(output_dir, step, figures)
        write_pictures(output_dir, step, result.pictures, accelerator.trackers)
        write_sounds(output_dir, step, result.sounds, result.sampling_rate, accelerator.trackers)
    line = ", ".join(f"{name} {value:.4g}" for name, value in result.figures.items())
    tqdm.write(f"step {step}: {line}")


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
    """Save images (3, H, W) in [0, 1] as PNG and hand them to the trackers that take images."""
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
    """Save waveforms (samples,) in [-1, 1] as 16-bit WAV and hand them to the trackers that take audio."""
    if not sounds:
        return
    import soundfile  # not needed to train on images

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
