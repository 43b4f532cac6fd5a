"""Reconstruct photographs with the shipped image tokenizer, and fine-tune it on images of another kind.

  python -m training.demo.image OUTPUT_DIR

Everything is real: photographs that the tokenizer never saw, the trainer, the checkpoint, and a new process
that loads the fine-tuned model with AutoModel.
"""

import io
import json
import math
import re
from pathlib import Path

import numpy as np
from PIL import Image

from training.demo.launcher import (
    CHECKPOINTS,
    clear,
    clear_run,
    launch_trainer,
    run_demo,
    steps_of_a_minute,
)

SHIPPED = CHECKPOINTS / "simvq-image-small"
# Of the wheels of scikit-image and scikit-learn; none was seen in training.
PHOTOS = ("chelsea", "astronaut", "coffee", "rocket", "china", "flower")
# Stained tissue under the microscope: fine-tuned on its left half, and measured on its right.
OTHER_KIND = "immunohistochemistry"
HEIGHT, TILE = 256, 128


def load_photo(name: str) -> Image.Image:
    """Return a photograph from the wheels of scikit-image and scikit-learn."""
    if name in ("china", "flower"):
        from sklearn.datasets import load_sample_image

        return Image.fromarray(load_sample_image(f"{name}.jpg"))
    import skimage.data

    return Image.fromarray(getattr(skimage.data, name)()[..., :3])


def scaled(photo: Image.Image) -> Image.Image:
    """Return the photograph at the height that the demo shows."""
    return photo.resize((photo.width * HEIGHT // photo.height, HEIGHT), Image.Resampling.BICUBIC)


def write_training_folder(folder: Path) -> int:
    """Cut the left half of the tissue, at two scales, into overlapping tiles; returns their number."""
    files = [path for path in folder.rglob("*") if not path.is_dir()]
    clear(folder, all(re.fullmatch(r"(tissue|\d+)[_\d]*\.png", path.name) for path in files))
    (folder / "train").mkdir(parents=True)
    (folder / "validation").mkdir()
    left, right = halves()
    count = 0
    for side in (256, 512):
        image = left.resize((side // 2, side), Image.Resampling.BICUBIC)
        for top in range(0, image.height - TILE + 1, TILE // 2):
            for start in range(0, image.width - TILE + 1, TILE // 2):
                tile = image.crop((start, top, start + TILE, top + TILE))
                tile.save(folder / "train" / f"{side}_{top}_{start}.png")
                count += 1
    right.save(folder / "validation" / "tissue.png")
    return count


def halves() -> tuple[Image.Image, Image.Image]:
    """Return the left and the right half of the image of another kind."""
    image = load_photo(OTHER_KIND)
    middle = image.width // 2
    return (
        image.crop((0, 0, middle, image.height)),
        image.crop((middle, 0, image.width, image.height)),
    )


def reconstruct(model_dir: Path, images: list[Image.Image]) -> tuple[list[Image.Image], list]:
    """Load with AutoModel; return the images as their codes alone give them back, and the codes."""
    import torch
    from transformers import AutoImageProcessor, AutoModel
    from transformers.utils import logging

    import modeling_simvq  # noqa: F401  (registers the Auto classes)

    logging.disable_progress_bar()
    model = AutoModel.from_pretrained(model_dir).eval()
    processor = AutoImageProcessor.from_pretrained(model_dir)
    decoded, codes = [], []
    with torch.no_grad():
        for image in images:
            inputs = processor(image, do_resize=False, do_center_crop=False, return_tensors="pt")
            found = model.encode(**inputs).image_codes
            pixels = model.decode(image_codes=found).pixel_values
            decoded += processor.post_process(pixels, [(image.height, image.width)])
            codes.append(found.numpy())
    return decoded, codes


def show_shipped(output_dir: Path) -> dict:
    """Reconstruct the photographs from their codes; write sheet and codes, and return the figures."""
    from torchvision.utils import save_image

    from hub_cards.sheets import from_pil, image_sheet
    from training.codebook.usage import reachable_utilisation

    photos = [scaled(load_photo(name)) for name in PHOTOS]
    decoded, codes = reconstruct(SHIPPED, photos)
    size = json.loads((SHIPPED / "config.json").read_text())["codebook_size"]
    bits = math.log2(size)
    rows = {}
    for name, photo, ours, found in zip(PHOTOS, photos, decoded, codes, strict=True):
        count = math.ceil(found.size * bits / 8)
        rows[name] = {
            "bytes": count,
            "psnr": psnr(photo, ours),
            "psnr_8x8_block_means": psnr(photo, block_means(photo, 8)),
            "webp": at_bytes(photo, "WEBP", count),
            "jpeg": at_bytes(photo, "JPEG", count),
            "codes_used": len(np.unique(found)),
            "tokens": found.size,
        }
        pair = image_sheet(from_pil([photo, ours]), columns=2, gap=4, border=False)
        save_image(pair, output_dir / f"{name}.png")
    np.savez(output_dir / "codes.npz", **dict(zip(PHOTOS, codes, strict=True)))
    everything = np.concatenate([found.ravel() for found in codes])
    tokens, used = everything.size, len(np.unique(everything))
    return {
        "photos": rows,
        "codebook_size": size,
        "tokens": tokens,
        "used": used / size,
        "reachable": reachable_utilisation(tokens, size),
    }


def at_bytes(photo: Image.Image, kind: str, count: int) -> dict[str, float]:
    """Return bytes and PSNR of the best file of a kind with at most so many bytes, or of its smallest."""
    best = None
    for quality in range(96):
        file = io.BytesIO()
        photo.save(file, kind, quality=quality)
        if best is not None and file.tell() > count:
            break
        best = file
    return {"bytes": best.tell(), "psnr": psnr(photo, Image.open(best).convert("RGB"))}


def train(output_dir: Path) -> None:
    """Fine-tune the shipped tokenizer with the real trainer, as a user would."""
    tiles, run = output_dir / "tissue", output_dir / "run"
    clear_run(run)  # first, for it refuses while another demo trains there
    count = write_training_folder(tiles)
    steps = steps_of_a_minute(SHIPPED, (4, 3, 128, 128))
    print(
        f"\nfine-tuning on {count} tiles of stained tissue, {tiles}: {steps} steps, about a minute"
    )
    words = [f"init_from={SHIPPED}", f"output_dir={run}", f"dataset={tiles}", f"max_steps={steps}"]
    launch_trainer("train_image.py", "demo_image.yaml", *words)


def show_tuned(output_dir: Path) -> dict:
    """Reconstruct the right half of the tissue with both tokenizers; write a sheet, and return the figures."""
    from torchvision.utils import save_image

    from hub_cards.sheets import from_pil, image_sheet

    _, right = halves()
    ((before,), _), ((after,), _) = (
        reconstruct(model_dir, [right]) for model_dir in (SHIPPED, output_dir / "run" / "model")
    )
    sheet = image_sheet(from_pil([right, before, after]), columns=3, gap=4, border=False)
    save_image(sheet, output_dir / "tissue.png")
    return {"psnr_before": psnr(right, before), "psnr_after": psnr(right, after)}


def show(output_dir: Path, tuned: bool) -> None:
    """Reconstruct, before or after fine-tuning; write figures.json and print what it says."""
    path = output_dir / "figures.json"
    if not tuned:
        figures = show_shipped(output_dir)
        print(
            "\nPhotographs that the shipped tokenizer never saw, from their codes alone (PSNR in dB):"
        )
        print("              bytes   SimVQ    8 x 8 means      WebP (bytes)      JPEG (bytes)")
        for name, row in figures["photos"].items():
            print(
                f"  {name:10} {row['bytes']:6,}   {row['psnr']:5.2f}          "
                f"{row['psnr_8x8_block_means']:5.2f}     {row['webp']['psnr']:5.2f} "
                f"({row['webp']['bytes']:6,})    {row['jpeg']['psnr']:5.2f} ({row['jpeg']['bytes']:6,})"
            )
        print(
            f"  {figures['used']:.1%} of {figures['codebook_size']:,} codes used by {figures['tokens']:,} "
            f"tokens, which could reach {figures['reachable']:.1%}"
        )
    else:
        figures = json.loads(path.read_text()) | {"tissue": show_tuned(output_dir)}
        tissue = figures["tissue"]
        print("\nThe half of the tissue that fine-tuning did not see:")
        print(f"  PSNR before {tissue['psnr_before']:.2f} dB, after {tissue['psnr_after']:.2f} dB")
        print(f"  the model, for AutoModel: {output_dir / 'run' / 'model'}")
    path.write_text(json.dumps(figures, indent=2) + "\n")


def block_means(photo: Image.Image, side: int) -> Image.Image:
    """Return the image with every side x side block replaced by its mean, what a naive code would keep."""
    pixels = np.asarray(photo, dtype=np.float32).copy()
    for top in range(0, pixels.shape[0], side):
        for left in range(0, pixels.shape[1], side):
            block = pixels[top : top + side, left : left + side]
            block[:] = block.mean(axis=(0, 1))
    return Image.fromarray(pixels.round().astype(np.uint8))


def psnr(first: Image.Image, second: Image.Image) -> float:
    """Return the peak signal-to-noise ratio of two 8-bit images, in dB."""
    from skimage.metrics import peak_signal_noise_ratio

    return float(peak_signal_noise_ratio(np.asarray(first), np.asarray(second)))


if __name__ == "__main__":
    run_demo(__spec__.name, __doc__.splitlines()[0], train, show)
