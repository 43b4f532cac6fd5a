"""A code model over a tokenizer of images: its training, and what it cannot predict."""

import dataclasses
from pathlib import Path

import torch
from torch import Tensor, nn

from modeling_simvq import SimVQForImageGeneration
from training.codebook.predictability import predictability, prefix_entropies
from training.data.codes import TokenDataConfig, open_codes
from training.data.model_images import EvaluatedImages, at_trained_resolution
from training.experiments.one_training import train_model
from training.recipes.generator import build_generator_recipe
from training.tokenization.job import Job, TokenizeSettings

BATCH = 100


def train_and_evaluate(groups: dict) -> dict[str, float | list[float]]:
    """Tokenize, train and evaluate.

    Args:
        groups: settings of the task; `dataset` names the images, and `tokenizer` a folder.

    Returns:
        bits, train_bits: of a whole held-out image, and of a training image; bits_by_position and
            train_bits_by_position: their parts, in raster order.
        prefix_entropies: see there, of the training images.
        Those of `predictability`, of the training codes alone.
    """
    data, model_settings = groups["data"], groups["model"]
    images = EvaluatedImages(dataset=data.dataset, num_workers=0)
    at_trained_resolution(images, model_settings.tokenizer)
    codes = folder_of_codes(model_settings.tokenizer)
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
    return figures | predictability(train, codebook).metrics()


def folder_of_codes(tokenizer: str) -> Path:
    """Return where the codes of a run's tokenizer are: beside its model."""
    return Path(tokenizer).with_name("codes")


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


def read_codes(data: TokenDataConfig, split: str) -> Tensor:
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
