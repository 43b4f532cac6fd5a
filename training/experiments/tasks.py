"""Trainings that experiments repeat, of tokenizers and code models: a run's settings, and its figures."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader

from modeling_simvq.straight_through import to_rows
from training.codebook.usage import CodeCounter, CodeUsage, effective_rank
from training.data.codes import TokenDataConfig
from training.data.images import ImageDataConfig
from training.data.recordings import AudioDataConfig
from training.experiments.one_training import train_model
from training.recipes.audio import AudioLoopSettings, AudioLossSettings, AudioModelSettings
from training.recipes.drawn_samples import SampleSettings
from training.recipes.generator import GeneratorLoopSettings, GeneratorModelSettings
from training.recipes.image import ImageLossSettings, ImageModelSettings
from training.recipes.tokenizer import TokenizerLoopSettings
from training.runtime.settings import build_settings

# Utilisation is counted over so many tokens of training images for every code, if there are as many.
TOKENS_PER_CODE = 16


@dataclass(frozen=True)
class Task:
    """One kind of training.

    Attributes:
        groups: dataclasses of its settings, by name.
        config: file in training/configs that gives its scale.
        train_and_evaluate: trains by flat settings, and returns the figures.
    """

    groups: dict[str, type]
    config: str
    train_and_evaluate: Callable[[dict], dict[str, float]]


def _images(settings: dict) -> dict[str, float]:
    from training.data.images import build_image_dataloader, to_values
    from training.evaluation.image import evaluate
    from training.losses.perceptual import load_lpips
    from training.recipes.image import build_image_recipe

    groups = build_settings(TASKS["images"].groups, settings)
    model, accelerator = train_model(groups, build_image_recipe)
    data = groups["data"]

    def pictures(split: str, limit: int | None):
        data.max_validation_samples = limit
        batch_size = groups["loop"].batch_size
        loader = build_image_dataloader(data, split, batch_size=batch_size, train=False, seed=0)
        return accelerator.prepare(loader)

    lpips = {"alex": load_lpips("alex").to(accelerator.device)}
    loader = pictures(data.validation_split, None)
    metrics = evaluate(model, loader, accelerator, perceptual=lpips).metrics
    for count in range(1, model.config.num_quantizers):
        found = evaluate(model, loader, accelerator, perceptual=lpips, num_quantizers=count).metrics
        metrics |= {f"{name}_first_{count}": found[name] for name in ("psnr", "ssim", "lpips_alex")}
    tokens = (data.resolution // model.config.downsample_factor) ** 2
    enough = -(-TOKENS_PER_CODE * model.config.codebook_size // tokens)
    # A validation set may have fewer tokens than there are codes.
    with torch.no_grad():
        counter, ranks = _counter(model, accelerator.device), LatentRank()
        for batch in pictures(data.train_split, enough):
            if batch["valid"].any():
                values = to_values(batch["pixel_values"][batch["valid"]])
                encoded = model.encode(values)
                counter.update(encoded.image_codes)
                ranks.add(encoded.latents)
    return metrics | ranks.metrics() | _training_usage(counter.read(accelerator))


def _speech(settings: dict) -> dict[str, float]:
    from training.evaluation.audio import evaluate, whole_recordings
    from training.metrics.speech import LOADERS
    from training.recipes.audio import build_audio_recipe

    groups = build_settings(TASKS["speech"].groups, settings)
    model, accelerator = train_model(groups, build_audio_recipe)
    data, device = groups["data"], accelerator.device

    def recordings(split: str) -> DataLoader:
        return whole_recordings(data, split, model.config.sampling_rate, accelerator)

    speech = {name: LOADERS[name](device) for name in ("pesq", "stoi")}
    metrics = evaluate(model, recordings(data.validation_split), accelerator, speech).metrics
    for count in range(1, model.config.num_quantizers):
        held_out = recordings(data.validation_split)
        found = evaluate(model, held_out, accelerator, speech, num_quantizers=count).metrics
        metrics |= {f"{n}_first_{count}": found[n] for n in ("pesq", "stoi", "bitrate")}
    with torch.no_grad():
        counter, ranks = _counter(model, device), LatentRank()
        for batch in recordings(data.train_split):
            if batch["valid"].all():
                encoded = model.encode(batch["input_values"].to(device))
                counter.update(encoded.audio_codes)
                ranks.add(encoded.latents)
    return metrics | ranks.metrics() | _training_usage(counter.read(accelerator))


def _code_models(settings: dict) -> dict[str, float | list[float]]:
    """Train on the codes of images: `dataset` names the images, and `tokenizer` what turns them into codes."""
    from training.experiments.code_models import train_and_evaluate

    return train_and_evaluate(build_settings(TASKS["code_models"].groups, settings))


class LatentRank:
    """Effective rank of the first latents that are added."""

    def __init__(self, most_rows: int = 16_384):
        self._parts: list[torch.Tensor] = []
        self._missing = most_rows

    def add(self, latents: torch.Tensor) -> None:
        """Take from latents (B, d, *spatial)."""
        rows = to_rows(latents.float())[: self._missing]
        self._missing -= len(rows)
        self._parts.append(rows.cpu())

    def metrics(self) -> dict[str, float]:
        """Return it, by its name in tables."""
        return {"rank_latents": effective_rank(torch.cat(self._parts))}


def _counter(model, device: torch.device) -> CodeCounter:
    return CodeCounter(model.config.codebook_size, device, model.config.num_quantizers)


def _training_usage(usage: CodeUsage) -> dict[str, float]:
    return {
        "train_utilisation": usage.utilisation,
        "train_perplexity": usage.perplexity,
        "train_tokens_per_code": usage.tokens / usage.codebook_size,
    }


TASKS = {
    "images": Task(
        {
            "data": ImageDataConfig,
            "model": ImageModelSettings,
            "loss": ImageLossSettings,
            "loop": TokenizerLoopSettings,
        },
        "experiments_small.yaml",
        _images,
    ),
    "speech": Task(
        {
            "data": AudioDataConfig,
            "model": AudioModelSettings,
            "loss": AudioLossSettings,
            "loop": AudioLoopSettings,
        },
        "speech_small.yaml",
        _speech,
    ),
    "code_models": Task(
        {
            "data": TokenDataConfig,
            "model": GeneratorModelSettings,
            "samples": SampleSettings,
            "loop": GeneratorLoopSettings,
        },
        "code_models_small.yaml",
        _code_models,
    ),
}
