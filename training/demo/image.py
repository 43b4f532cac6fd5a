"""Train a small image tokenizer on photographs that come with installed packages, and show what it does.

  python -m training.demo.image OUTPUT_DIR

Everything is real: the trainer, the losses, the checkpoint, and a new process that loads it with AutoModel
and reconstructs a photograph that the training never saw.
"""

import json
import math
import re
from pathlib import Path

import numpy as np
from PIL import Image

from training.demo.launcher import clear, clear_run, launch_trainer, run_demo

TRAINING_PHOTOS = ("astronaut", "coffee", "rocket", "china", "flower")
HELD_OUT = "chelsea"
TILE = 64


def load_photo(name: str) -> Image.Image:
    """A photograph from the wheels of scikit-image and scikit-learn."""
    if name in ("china", "flower"):
        from sklearn.datasets import load_sample_image

        return Image.fromarray(load_sample_image(f"{name}.jpg"))
    import skimage.data

    return Image.fromarray(getattr(skimage.data, name)()[..., :3])


def write_training_folder(folder: Path) -> int:
    """Cut the training photographs, at several scales, into overlapping tiles; returns their number."""
    names = "|".join((*TRAINING_PHOTOS, HELD_OUT))
    files = [path for path in folder.rglob("*") if not path.is_dir()]
    clear(folder, all(re.fullmatch(rf"({names})[_\d]*\.png", path.name) for path in files))
    (folder / "train").mkdir(parents=True)
    count = 0
    for name in TRAINING_PHOTOS:
        photo = load_photo(name)
        for short_side in (128, 192, 288):
            scale = short_side / min(photo.size)
            size = [max(short_side, round(side * scale)) for side in photo.size]
            scaled = photo.resize(size, Image.Resampling.BICUBIC)
            for top in range(0, scaled.height - TILE + 1, TILE // 2):
                for left in range(0, scaled.width - TILE + 1, TILE // 2):
                    tile = scaled.crop((left, top, left + TILE, top + TILE))
                    tile.save(folder / "train" / f"{name}_{short_side}_{top}_{left}.png")
                    count += 1
    (folder / "validation").mkdir()
    load_photo(HELD_OUT).save(folder / "validation" / f"{HELD_OUT}.png")
    return count


def train(output_dir: Path) -> None:
    """Write the photographs and run the real trainer as a user would."""
    photos, run = output_dir / "photos", output_dir / "run"
    clear_run(run)  # first, for it refuses while another demo trains there
    count = write_training_folder(photos)
    print(f"{count} tiles of {len(TRAINING_PHOTOS)} photographs are in {photos}")
    launch_trainer("train_image.py", "demo_image.yaml", f"dataset={photos}", f"output_dir={run}")


def show(model_dir: Path, output_dir: Path) -> None:
    """Load with AutoModel, reconstruct the held-out photograph from its codes alone, write the results."""
    import torch
    from torchvision.utils import save_image
    from transformers import AutoImageProcessor, AutoModel
    from transformers.utils import logging

    import modeling_simvq  # noqa: F401  (registers the Auto classes)
    from hub_cards.sheets import from_pil, image_sheet

    logging.disable_progress_bar()
    model = AutoModel.from_pretrained(model_dir).eval()
    processor = AutoImageProcessor.from_pretrained(model_dir)
    photo = load_photo(HELD_OUT)
    photo = photo.resize((photo.width * 256 // photo.height, 256), Image.Resampling.BICUBIC)
    inputs = processor(photo, do_resize=False, do_center_crop=False, return_tensors="pt")
    size = [(photo.height, photo.width)]

    with torch.no_grad():
        codes = model.encode(**inputs).image_codes
        decoded = processor.post_process(model.decode(image_codes=codes).pixel_values, size)[0]
        untrained = type(model)(model.config).eval()
        before = processor.post_process(untrained(**inputs).pixel_values, size)[0]
    blocks = block_means(photo, 8)

    np.save(output_dir / "codes.npy", codes.numpy())
    row = image_sheet(from_pil([photo, decoded, blocks]), columns=3, gap=4, border=False)
    save_image(row, output_dir / "side_by_side.png")
    figures = {
        "psnr": psnr(photo, decoded),
        "psnr_untrained": psnr(photo, before),
        "psnr_8x8_block_means": psnr(photo, blocks),
        "codes_used": int(codes.unique().numel()),
        "tokens": codes.numel(),
    }
    (output_dir / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    bits = codes.numel() * math.log2(model.config.codebook_size)
    print(
        f"\nA photograph that training never saw ({HELD_OUT}, {photo.width} x {photo.height} pixels):"
    )
    print(
        f"  {codes.numel()} codes, {figures['codes_used']} different, {bits / 8192:.1f} KiB in all"
    )
    print(f"  PSNR of the reconstruction        {figures['psnr']:6.2f} dB")
    print(f"  PSNR before training              {figures['psnr_untrained']:6.2f} dB")
    print(f"  PSNR of 8 x 8 block means         {figures['psnr_8x8_block_means']:6.2f} dB")
    print(f"  original, reconstruction, blocks: {output_dir / 'side_by_side.png'}")
    print(f"  codes:                            {output_dir / 'codes.npy'}")
    print(f"  the model, for AutoModel:         {model_dir}")


def block_means(photo: Image.Image, side: int) -> Image.Image:
    """The image with every side x side block replaced by its mean: what a naive code of this rate keeps."""
    pixels = np.asarray(photo, dtype=np.float32).copy()
    for top in range(0, pixels.shape[0], side):
        for left in range(0, pixels.shape[1], side):
            block = pixels[top : top + side, left : left + side]
            block[:] = block.mean(axis=(0, 1))
    return Image.fromarray(pixels.round().astype(np.uint8))


def psnr(first: Image.Image, second: Image.Image) -> float:
    """Peak signal-to-noise ratio of two 8-bit images, in dB."""
    from skimage.metrics import peak_signal_noise_ratio

    return float(peak_signal_noise_ratio(np.asarray(first), np.asarray(second)))


if __name__ == "__main__":
    run_demo(__spec__.name, __doc__.splitlines()[0], train, show)
