"""Recipe of the audio tokenizer: model, discriminators, losses, audio samples and spectrograms, validation."""

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hub_cards.sheets import spectrogram_sheet
from modeling_simvq import SimVQAudioConfig, SimVQAudioFeatureExtractor, SimVQAudioModel
from training.codebook.settings import QuantizerSettings
from training.data.loader import first_batch
from training.data.recordings import AudioDataConfig, build_audio_dataloader
from training.loop.recipe import Validation
from training.loop.validation import run_validation
from training.losses.audio import AudioLoss
from training.losses.audio_discriminators import AudioDiscriminator
from training.losses.mel import LogMelSpectrogram
from training.recipes.encoder_start import start_from_data
from training.recipes.starting_model import StartSettings, begin_from, is_chosen, load_source
from training.recipes.tokenizer import TokenizerLoopSettings, TokenizerRecipe
from training.runtime.settings import SettingsError, at_least, setting, settings_of

SHOWN_CLIPS = 2


MODEL_FIELDS = ("num_filters", "downsampling_ratios", "num_residual_layers", "num_lstm_layers")
MODEL_FIELDS += ("codebook_size", "codebook_dim", "commitment_cost", "hidden_size")
MODEL_FIELDS += ("norm_groups", "intermediate_size", "num_decoder_layers", "dropout", "n_fft")
MODEL_FIELDS += ("attention_window",)


@dataclass
class AudioModelSettings(
    settings_of(SimVQAudioConfig, *MODEL_FIELDS), QuantizerSettings, StartSettings
):
    """The tokenizer (fields of SimVQAudioConfig)."""

    # `streaming` is a setting of the data.
    streamable: bool = setting(
        False, "every layer looks at the past alone, so that speech can be coded as it comes"
    )
    start_from_data: bool = setting(
        False, "scale the encoder's layers by a first batch: short trainings need it"
    )

    def __post_init__(self):
        self.check_start("codebook_features", "start_from_data")
        if self.init_from is None:  # otherwise its sizes come from there
            self.config()

    def config(self, sampling_rate: int = 24_000) -> SimVQAudioConfig:
        """The model's configuration, validated."""
        try:
            values = self.fields_of(SimVQAudioConfig) | {"streaming": self.streamable}
            return SimVQAudioConfig(sampling_rate=sampling_rate, **values)
        except ValueError as error:
            raise SettingsError(str(error)) from error

    def build(self, data: AudioDataConfig) -> SimVQAudioModel:
        """Build the tokenizer, from init_from if it is set: settings that nobody has chosen come from there.

        Raises:
            SettingsError: if init_from cannot be loaded, or has other sizes than were chosen.
        """
        if self.init_from is None:
            model = SimVQAudioModel(self.config(data.sampling_rate))
            self.start(model)
            return model
        source = load_source(SimVQAudioModel, self.init_from, self.recorded)
        if is_chosen(self, "streamable") and self.streamable != source.config.streaming:
            raise SettingsError(
                f"init_from: the model there {'streams' if source.config.streaming else 'sees whole clips'}, "
                f"which streamable={str(self.streamable).lower()} would change: leave it out"
            )
        self.streamable = source.config.streaming
        if not is_chosen(data, "sampling_rate"):
            data.sampling_rate = source.config.sampling_rate
        return begin_from(source, self, sampling_rate=data.sampling_rate)


@dataclass
class AudioLossSettings:
    """The losses: mel + adversarial + feature matching + commitment."""

    mel_weight: float = setting(45.0, "weight of the log-mel L1")
    mel_windows: list[int] = setting(
        [1024], "windows of the log-mel L1, in samples; small models hear words sooner with several"
    )
    adversarial_weight: float = setting(1.0, "weight of adversarial and feature matching terms")
    commitment_weight: float = setting(1000.0, "weight of the quantizer's loss")
    discriminator_start: int = setting(0, "step from which the discriminators take part")
    period_channels: int = setting(32, "width of the multi-period discriminators")
    resolution_channels: int = setting(64, "width of the multi-resolution discriminators")
    dac_channels: int = setting(32, "width of the DAC's discriminators")

    def __post_init__(self):
        at_least(self, 0, "mel_weight", "adversarial_weight", "commitment_weight")
        at_least(self, 0, "discriminator_start")
        if not self.mel_windows or min(self.mel_windows) < 64:
            raise SettingsError(
                f"mel_windows must be one or more windows of at least 64 samples, got {self.mel_windows}"
            )
        at_least(self, 1, "period_channels", "resolution_channels", "dac_channels")

    def discriminator_sizes(self) -> dict[str, int]:
        """Return what the discriminators are built with."""
        names = ("period_channels", "resolution_channels", "dac_channels")
        return {name: getattr(self, name) for name in names}


@dataclass
class AudioLoopSettings(TokenizerLoopSettings):
    """The run: how long, how fast, what is kept. Steps are optimiser steps of the generator."""

    # Users of the original meet NaN without these two.
    warmup_steps: int = setting(1000, "linear warm-up from 0; helps against NaN")
    max_grad_norm: float | None = setting(1.0, "clip the gradients' norm, of each optimiser")
    batch_size: int = setting(32, "samples per process and forward pass")
    output_dir: str = setting(
        "runs/simvq_audio", "folder of checkpoints, audio samples, logs and the final model"
    )


class AudioRecipe(TokenizerRecipe):
    """See training.recipes.tokenizer.TokenizerRecipe."""

    headline = ("mel_distance", -1)

    def __init__(
        self,
        model: SimVQAudioModel,
        discriminator: nn.Module,
        loss: AudioLoss,
        train_loader: DataLoader,
        validation_loader: DataLoader | None,
    ):
        self.model, self.discriminator, self.loss = model, discriminator, loss
        self.train_loader, self.validation_loader = train_loader, validation_loader

    def inputs(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["input_values"]

    def reconstruction(self, output) -> Tensor:
        return output.audio_values

    def codes(self, output) -> Tensor:
        return output.audio_codes

    def last_layer(self, model: nn.Module) -> Tensor:
        return model.decoder.head.weight

    @torch.no_grad()
    def measure(self, model: nn.Module, loader: DataLoader, accelerator: Accelerator) -> Validation:
        rate = model.config.sampling_rate
        spectrogram = LogMelSpectrogram(rate).to(accelerator.device)
        pictures: dict[str, Tensor] = {}
        sounds: dict[str, Tensor] = {}

        def figures_of(batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
            waveforms = batch["input_values"]
            output = model(waveforms)
            decoded = output.audio_values.float()
            if not sounds:
                kept = batch["valid"]
                first = (clips[kept, 0][:SHOWN_CLIPS] for clips in (waveforms, decoded))
                for number, (original, ours) in enumerate(zip(*first, strict=True)):
                    shown = {"original": original, "reconstruction": ours}
                    sounds.update({f"{k}-{number}": v.cpu() for k, v in shown.items()})
                    pictures[f"spectrogram-{number}"] = spectrogram_sheet(shown, rate)
            mel = (spectrogram(decoded) - spectrogram(waveforms)).abs().mean(dim=(1, 2))
            figures = {"mel_distance": mel, "si_sdr": si_sdr(decoded, waveforms)[:, 0]}
            return figures, output.audio_codes

        figures = run_validation(loader, accelerator, model.config, figures_of)
        return Validation(figures, pictures, sounds, rate)

    def save_tokenizer(self, model: nn.Module, folder: Path) -> Path:
        return save_audio_tokenizer(model, folder)


def save_audio_tokenizer(model: SimVQAudioModel, folder: Path) -> Path:
    """Write the model and its feature extractor, and return the folder."""
    model.save_pretrained(folder)
    SimVQAudioFeatureExtractor(
        sampling_rate=model.config.sampling_rate, hop_length=model.config.hop_length
    ).save_pretrained(folder)
    return folder


def build_audio_recipe(
    model: AudioModelSettings,
    data: AudioDataConfig,
    loss: AudioLossSettings,
    *,
    batch_size: int,
    seed: int,
) -> AudioRecipe:
    """Build the recipe from settings: open the dataset.

    Raises:
        SettingsError: if clips are no whole number of codes, or too short for the discriminators.
    """
    tokenizer = model.build(data)
    config = tokenizer.config
    if data.clip_samples % config.hop_length:
        whole = -(-data.clip_samples // config.hop_length) * config.hop_length
        raise SettingsError(
            f"clip_seconds: {data.clip_samples} samples are no multiple of the hop length "
            f"{config.hop_length}; {whole / data.sampling_rate:g} would be"
        )
    shortest = max(2048, *(window // 2 for window in loss.mel_windows))
    if data.clip_samples <= shortest:
        raise SettingsError(
            f"clip_seconds: the discriminators and mel_windows need more than {shortest} samples, got "
            f"{data.clip_samples}"
        )

    def loader(split: str | None, train: bool) -> DataLoader | None:
        if split is None:
            return None
        return build_audio_dataloader(data, split, batch_size=batch_size, train=train, seed=seed)

    train_loader = loader(data.train_split, train=True)
    if model.start_from_data:
        start_from_data(tokenizer.encoder, first_batch(train_loader)["input_values"])
    sizes = loss.discriminator_sizes()
    discriminator = AudioDiscriminator(**sizes)
    model.go_on_with(discriminator, sizes, loss.adversarial_weight)
    recipe = AudioRecipe(
        tokenizer,
        discriminator,
        AudioLoss(
            sampling_rate=data.sampling_rate,
            mel_weight=loss.mel_weight,
            mel_windows=loss.mel_windows,
            adversarial_weight=loss.adversarial_weight,
            commitment_weight=loss.commitment_weight,
            discriminator_start=loss.discriminator_start,
        ),
        train_loader,
        loader(data.validation_split, train=False),
    )
    recipe.beginning, recipe.discriminator_sizes = model, sizes
    return recipe


def si_sdr(estimate: Tensor, reference: Tensor) -> Tensor:
    """Return the scale-invariant signal-to-distortion ratio in dB (Le Roux et al. 2019), over the last axis.

    Generators that model magnitudes score low without sounding bad: read it beside the mel distance.

    Args:
        estimate, reference: (..., L).
    """
    from torchmetrics.functional.audio import (  # takes seconds to import
        scale_invariant_signal_distortion_ratio,
    )

    return scale_invariant_signal_distortion_ratio(estimate, reference, zero_mean=True)
