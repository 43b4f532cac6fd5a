"""Samples of a code model, to see and hear at every validation."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hub_cards.sheets import from_pixels, image_sheet
from modeling_simvq import SimVQForAudioGeneration, SimVQForImageGeneration
from training.runtime.settings import SettingsError, at_least, setting


@dataclass
class SampleSettings:
    """Samples at every validation, if the tokenizer is named."""

    samples: int = setting(4, "images of a class, or clips of audio; 0 for none")
    sample_classes: int = setting(8, "images: classes shown, a row each, from the first on")
    guidance_scale: float = setting(2.0, "images: of classifier-free guidance; 1 for none")
    temperature: float = setting(1.0, "below 1 for likelier codes, above for more various ones")
    top_k: int = setting(0, "sample from so many likeliest codes; 0 for all")
    top_p: float = setting(
        1.0, "sample from the likeliest codes that together have this probability"
    )

    def __post_init__(self):
        at_least(self, 0, "samples", "guidance_scale", "top_k")
        at_least(self, 1, "sample_classes")
        if not self.temperature > 0:
            raise SettingsError(f"temperature must be above 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise SettingsError(f"top_p must lie in (0, 1], got {self.top_p}")

    def choices(self) -> dict:
        """Settings of sampling; the same at every validation, so that its images can be compared."""
        names = ("temperature", "top_k", "top_p")
        return {k: getattr(self, k) for k in names} | {
            "generator": torch.Generator().manual_seed(0)
        }


@torch.no_grad()
def sample_pictures(
    model: SimVQForImageGeneration, tokenizer: PreTrainedModel, settings: SampleSettings
) -> dict[str, Tensor]:
    """A sheet of images (3, H, W) in [0, 1], a row for each class, under the name "samples"."""
    shown = min(settings.sample_classes, model.config.num_classes) or 1
    labels = None  # of a generator without classes: one row
    if model.config.num_classes:
        labels = torch.arange(shown)
    codes = model.generate_images(
        labels,
        num_images=settings.samples,
        guidance_scale=settings.guidance_scale if model.config.num_classes else 1.0,
        **settings.choices(),
    )
    if codes.ndim == 3 and tokenizer.config.num_quantizers > 1:  # those of the first alone
        codes = codes[:, None]
    pixels = tokenizer.decode(image_codes=codes).pixel_values
    return {"samples": image_sheet(from_pixels(pixels), settings.samples)}


@torch.no_grad()
def sample_sounds(
    model: SimVQForAudioGeneration, tokenizer: PreTrainedModel, settings: SampleSettings
) -> dict[str, Tensor]:
    """Clips (samples,) as long as those of training, under the names "sample-0" and so on."""
    made = model.generate_audio(
        model.config.max_codes, num_clips=settings.samples, **settings.choices()
    )
    sounds = tokenizer.decode(made.audio_codes).audio_values.float().cpu()
    return {f"sample-{number}": sound[0] for number, sound in enumerate(sounds)}
