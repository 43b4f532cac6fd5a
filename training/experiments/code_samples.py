"""Samples of a code model: how far they are from real images."""

import json
import os
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel

from modeling_simvq import SimVQForImageGeneration
from training.data.codes import TokenDataConfig
from training.data.images import build_image_dataloader, to_values
from training.data.model_images import EvaluatedImages, at_trained_resolution
from training.experiments.code_models import folder_of_codes, read_codes
from training.loop.validation import measured_batches
from training.metrics.images import to_bytes
from training.metrics.inception import frechet_distance, load_inception
from training.runtime.float64 import to_float64

# Images that are made for gFID, and training images that are decoded to tell what it would be at best. On a CPU
# the Inception network takes longer for them than the code model for its training.
SAMPLES = 500
BATCH = 100


def sample_distances(folder: Path, dataset: str, tokenizer: str, seed: int) -> dict[str, float]:
    """Measure the samples of a run of code_models, or read what was found before.

    Args:
        folder: of the run. What is found stays there, and features of the real images beside it.
        dataset: the images. tokenizer: folder of the model that the run was told.
        seed: of the samples, and of the training images that are decoded.

    Returns:
        gfid: Frechet distance of samples to all held-out images. floor_fid: that of as many training images,
        encoded and decoded: what samples of a perfect code model would have.
    """
    file = folder / "samples.json"
    if not file.exists():
        found = _measure(folder, dataset, tokenizer, seed)
        file.write_text(json.dumps(found) + "\n")
    return json.loads(file.read_text())


def _measure(folder: Path, dataset: str, tokenizer_folder: str, seed: int) -> dict[str, float]:
    accelerator = Accelerator()
    device = accelerator.device
    tokenizer, model = (
        AutoModel.from_pretrained(path).eval().to(device)
        for path in (tokenizer_folder, folder / "model")
    )
    images = EvaluatedImages(dataset=dataset, num_workers=0)
    at_trained_resolution(images, tokenizer_folder)
    inception = load_inception().to(device)
    # One file serves all runs on these images.
    kept = f"inception_{Path(dataset).name}_{images.resolution}.safetensors"
    real = to_float64(
        real_features(images, inception, accelerator, folder.with_name(kept)).to(device)
    )
    codes = TokenDataConfig(dataset=str(folder_of_codes(tokenizer_folder)), label_column=None)
    train = read_codes(codes, codes.train_split)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    sets = {
        "gfid": draw_images(model, SAMPLES, torch.Generator(device).manual_seed(seed)),
        "floor_fid": train[order[:SAMPLES]].to(device),
    }
    found = {}
    for name, chosen in sets.items():
        distance = frechet_distance(device)
        distance.update(real, real=True)
        distance.update(to_float64(decoded_features(tokenizer, chosen, inception)), real=False)
        found[name] = float(distance.compute())
    return found


@torch.no_grad()
def draw_images(model: SimVQForImageGeneration, count: int, generator: torch.Generator) -> Tensor:
    """Draw images without guidance: codes (count, h, w) on the model's device.

    As generate_images does, but a code of two factors costs two small classifiers here, and not all K logits.
    """
    height, width = model.config.grid_size
    drawn = []
    for start in range(0, count, BATCH):
        tokens = [model.start_tokens(None, min(BATCH, count - start), model.device)]
        past = None
        for _ in range(height * width):
            output = model.model(input_ids=tokens[-1], past_key_values=past, use_cache=True)
            past = output.past_key_values
            tokens.append(model.codes.draw(output.last_hidden_state[:, -1], generator)[:, None])
        drawn.append(torch.cat(tokens[1:], dim=1))
    return torch.cat(drawn).unflatten(1, (height, width))


@torch.no_grad()
def decoded_features(tokenizer: nn.Module, codes: Tensor, inception: nn.Module) -> Tensor:
    """Return Inception features (N, 2048) of the images that codes (N, h, w) stand for."""
    return torch.cat(
        [
            inception(to_bytes(tokenizer.decode(image_codes=batch).pixel_values.clamp(-1, 1)))
            for batch in codes.split(BATCH)
        ]
    )


def real_features(
    images: EvaluatedImages, inception: nn.Module, accelerator: Accelerator, file: Path
) -> Tensor:
    """Return Inception features (N, 2048) of all held-out images, from the file if it is there."""
    if not file.exists():
        loader = build_image_dataloader(
            images, images.validation_split, batch_size=BATCH, train=False, seed=0
        )

        def measure(batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
            pictures = to_bytes(to_values(batch["pixel_values"]))
            return {"features": inception(pictures)}, batch["valid"]  # there are no codes

        found = measured_batches(accelerator.prepare(loader), accelerator, measure, "real images")
        features = torch.cat([figures["features"].cpu() for figures, *_ in found])
        unfinished = file.with_suffix(f".{os.getpid()}")
        save_file({"features": features}, unfinished)
        unfinished.replace(file)
    return load_file(file)["features"]
