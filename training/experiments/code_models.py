"""A code model over a tokenizer of images: its training, what it cannot predict, and its samples."""

import dataclasses
import os
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from modeling_simvq import SimVQForImageGeneration
from training.codebook.predictability import predictability, prefix_entropies
from training.data.codes import open_codes
from training.data.images import build_image_dataloader, to_values
from training.data.model_images import EvaluatedImages, at_trained_resolution
from training.experiments.one_training import train_model
from training.loop.validation import measured_batches
from training.metrics.images import to_bytes
from training.metrics.inception import frechet_distance, load_inception
from training.recipes.generator import build_generator_recipe
from training.runtime.float64 import to_float64
from training.tokenization.job import Job, TokenizeSettings

# Images that are made for gFID, and training images that are decoded to tell what it would be at best: on a CPU
# the Inception network is the slowest part of a run.
SAMPLES = 500
BATCH = 100


def train_and_evaluate(groups: dict) -> dict[str, float | list[float]]:
    """Tokenize, train and evaluate.

    Args:
        groups: settings of the task; `dataset` names the images, and `tokenizer` a folder.

    Returns:
        bits, train_bits: of a whole held-out image, and of a training image; bits_by_position and
            train_bits_by_position: their parts, in raster order.
        prefix_entropies: see there, of the training images.
        gfid, floor_fid: distance of samples, and of decoded training images, to held-out images.
        Those of `predictability`, of the training codes alone.
    """
    data, model_settings = groups["data"], groups["model"]
    images = EvaluatedImages(dataset=data.dataset, num_workers=0)
    at_trained_resolution(images, model_settings.tokenizer)
    codes = Path(model_settings.tokenizer).with_name("codes")
    splits = {"train": data.train_split, "validation": data.validation_split}
    tokenizer = tokenize(model_settings.tokenizer, images, codes, list(splits.values()))
    groups |= {"data": dataclasses.replace(data, dataset=str(codes))}
    model, accelerator = train_model(groups, build_generator_recipe)
    device, seed = accelerator.device, groups["loop"].seed
    tokenizer.to(device)
    grids = {name: read_codes(groups["data"], split) for name, split in splits.items()}
    held_out, train = grids["validation"], grids["train"]
    by_position = bits_by_position(model, held_out.to(device))
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    train_by_position = bits_by_position(model, train[order[: len(held_out)]].to(device))
    figures = {
        "bits": sum(by_position),
        "train_bits": sum(train_by_position),
        "bits_by_position": by_position,
        "train_bits_by_position": train_by_position,
        "prefix_entropies": prefix_entropies(train.flatten(1)),
    }
    codebook = tokenizer.quantizer.codebook().detach().cpu()
    figures |= predictability(train, codebook, seed=0).metrics()

    inception = load_inception().to(device)
    # One file serves all runs on these images.
    kept = f"inception_{Path(data.dataset).name}_{images.resolution}.safetensors"
    real = real_features(images, inception, accelerator, codes.parent.with_name(kept))
    generator = torch.Generator(device).manual_seed(seed)
    for name, chosen in (
        ("gfid", draw_images(model, SAMPLES, generator)),
        ("floor_fid", train[order[:SAMPLES]].to(device)),
    ):
        distance = frechet_distance(device)
        distance.update(to_float64(real.to(device)), real=True)
        distance.update(to_float64(decoded_features(tokenizer, chosen, inception)), real=False)
        figures[name] = float(distance.compute())
    return figures


def tokenize(model: str, images: EvaluatedImages, folder: Path, splits: list[str]) -> nn.Module:
    """Write the codes of images into a folder, as tokenize_dataset does; return the tokenizer.

    Files that are there already stay.
    """
    settings = TokenizeSettings(model=model, output=str(folder), splits=splits, batch_size=BATCH)
    job = Job(settings, images, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    for split in splits:
        for portion in job.portions(split):
            job.write(split, portion)
    return job.model


def read_codes(data, split: str) -> Tensor:
    """Return all codes of a split, (N, h, w) int64."""
    return torch.as_tensor(open_codes(data, split).with_format("numpy")["image_codes"][:]).long()


@torch.no_grad()
def bits_by_position(model: SimVQForImageGeneration, codes: Tensor) -> list[float]:
    """Return what the model cannot predict: mean bits of the code at each position of images (N, h, w)."""
    sums = torch.zeros(codes[0].numel(), dtype=torch.float64)
    for batch in codes.flatten(1).split(BATCH):
        starts = model.start_tokens(None, len(batch), batch.device)
        tokens = torch.cat([starts, batch[:, :-1]], dim=1)
        hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
        for position, sum_ in enumerate(sums):
            loss = model.codes.loss(hidden[:, position], batch[:, position])
            sum_ += float(loss) * len(batch)
    return (sums / len(codes) / torch.tensor(2.0).log()).tolist()


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
