"""Recipe of the image tokenizer: model, PatchGAN, losses, images, validation."""

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hub_cards.sheets import from_pixels, image_sheet
from modeling_simvq import SimVQImageConfig, SimVQImageModel, SimVQImageProcessor
from training.codebook.settings import QuantizerSettings
from training.data.image_sizes import (
    LPIPS,
    SSIM,
    check_resolution,
    smallest_for_discriminator,
    trained_resolution,
)
from training.data.images import ImageDataConfig, build_image_dataloader, to_values
from training.loop.recipe import Validation
from training.loop.validation import run_validation
from training.losses.image import ImageLoss
from training.losses.patch_discriminator import PatchDiscriminator
from training.losses.perceptual import load_lpips
from training.metrics.images import image_figures
from training.recipes.starting_model import StartSettings, begin_from, is_chosen, load_source
from training.recipes.tokenizer import TokenizerRecipe
from training.runtime import fast_math
from training.runtime.settings import SettingsError, at_least, one_of, setting, settings_of

MODEL_FIELDS = ("base_channels", "channel_multipliers", "num_res_blocks", "norm_groups")
MODEL_FIELDS += (
    "norm_per_position",
    "attention",
    "codebook_size",
    "codebook_dim",
    "commitment_cost",
)

SHOWN_IMAGES = 8
# Channels of a group below which each image loses its own brightness and tint in the norms; the published
# models have 4 at the first level, and data enough to make up for it.
NARROW_GROUP = 4


@dataclass
class ImageModelSettings(
    settings_of(SimVQImageConfig, *MODEL_FIELDS), QuantizerSettings, StartSettings
):
    """The tokenizer (fields of SimVQImageConfig)."""

    def __post_init__(self):
        self.check_start("codebook_features")
        if self.init_from is None:  # otherwise its sizes come from there
            self.config()

    def config(self) -> SimVQImageConfig:
        """The model's configuration, validated."""
        try:
            return SimVQImageConfig(**self.fields_of(SimVQImageConfig))
        except ValueError as error:
            raise SettingsError(str(error)) from error

    def build(self, data: ImageDataConfig) -> SimVQImageModel:
        """Build the tokenizer, from init_from if it is set: settings that nobody has chosen come from there.

        Raises:
            SettingsError: if init_from cannot be loaded, or has other sizes than were chosen.
        """
        if self.init_from is None:
            model = SimVQImageModel(self.config())
            self.start(model)
            return model
        source = load_source(SimVQImageModel, self.init_from, self.recorded)
        if not is_chosen(data, "resolution"):
            found = (
                _resolution(self.init_from)
                if self.recorded is None
                else self.recorded.settings.get("resolution")
            )
            data.resolution = found or data.resolution
        return begin_from(source, self)


@dataclass
class ImageLossSettings:
    """The losses: L1 + LPIPS + adversarial + commitment."""

    reconstruction_weight: float = setting(1.0, "weight of L1")
    colour_weight: float = setting(
        0.0, "weight of L1 of the colours alone, which short trainings otherwise lose"
    )
    perceptual: str = setting("vgg", "LPIPS network: vgg, alex, or none to train without")
    perceptual_weight: float = setting(1.0, "weight of LPIPS")
    adversarial_weight: float | None = setting(0.1, "weight of the discriminator; null adapts it")
    adaptive_scale: float = setting(1.0, "factor on the adaptive weight")
    discriminator_start: int = setting(0, "step from which the discriminator takes part")
    discriminator_channels: int = setting(64, "width of the PatchGAN's first layer")
    discriminator_layers: int = setting(3, "strided layers of the PatchGAN")
    sync_batch_norm: bool = setting(
        False,
        "GPUs: the PatchGAN's batch norm sees the batches of all processes, for small ones each",
    )
    lecam_weight: float = setting(0.0, "weight of LeCAM regularisation, for small datasets")
    commitment_weight: float = setting(1.0, "weight of the quantizer's loss")

    def __post_init__(self):
        one_of(self, "perceptual", ("vgg", "alex", "none"))
        at_least(self, 0, "reconstruction_weight", "perceptual_weight", "lecam_weight")
        at_least(self, 0, "colour_weight")
        at_least(self, 0, "commitment_weight", "discriminator_start", "adaptive_scale")
        at_least(self, 1, "discriminator_channels", "discriminator_layers")

    def discriminator_sizes(self) -> dict[str, int]:
        """Return what the discriminator is built with."""
        return {
            "base_channels": self.discriminator_channels,
            "num_layers": self.discriminator_layers,
        }


class ImageRecipe(TokenizerRecipe):
    """See training.recipes.tokenizer.TokenizerRecipe."""

    headline = ("psnr", 1)
    of_images = True

    def __init__(
        self,
        model: SimVQImageModel,
        discriminator: nn.Module,
        loss: ImageLoss,
        perceptual: nn.Module | None,
        train_loader: DataLoader,
        validation_loader: DataLoader | None,
        resolution: int,
    ):
        self.model, self.discriminator = model, discriminator
        self.loss, self.perceptual = loss, perceptual
        if perceptual is None:
            self.remarks += ("training without a perceptual loss (perceptual: none)",)
        config = model.config
        if config.base_channels < NARROW_GROUP * config.norm_groups:
            self.remarks += (
                f"norm_groups={config.norm_groups} of {config.base_channels} channels: groups of few channels "
                "lose the colours of an image; a new model keeps them with "
                f"norm_groups={max(1, config.base_channels // 16)}",
            )
        self.train_loader, self.validation_loader = train_loader, validation_loader
        self.resolution = resolution

    def inputs(self, batch: dict[str, Tensor]) -> Tensor:
        return fast_math.laid_out(to_values(batch["pixel_values"]))

    def reconstruction(self, output) -> Tensor:
        return output.pixel_values

    def codes(self, output) -> Tensor:
        return output.image_codes

    def last_layer(self, model: nn.Module) -> Tensor:
        return model.decoder.conv_out.weight

    @torch.no_grad()
    def measure(self, model: nn.Module, loader: DataLoader, accelerator: Accelerator) -> Validation:
        pictures: dict[str, Tensor] = {}

        def figures_of(batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
            pixels = self.inputs(batch)
            output = model(pixels)
            reconstruction = output.pixel_values.clamp(-1, 1)
            figures = image_figures(pixels, reconstruction)
            if self.perceptual is not None:
                figures["lpips"] = self.perceptual(reconstruction, pixels).flatten()
            kept = batch["valid"]
            if not pictures and kept.any():
                rows = [images[kept][:SHOWN_IMAGES] for images in (pixels, reconstruction)]
                sheet = image_sheet(from_pixels(torch.cat(rows)), columns=len(rows[0]))
                pictures["reconstructions"] = sheet
            return figures, output.image_codes

        figures = run_validation(loader, accelerator, model.config, figures_of)
        return Validation(figures, pictures)

    def save_tokenizer(self, model: nn.Module, folder: Path) -> Path:
        return save_image_tokenizer(model, folder, self.resolution)


def save_image_tokenizer(model: SimVQImageModel, folder: Path, side: int) -> Path:
    """Write the model and a processor to its resolution, and return the folder."""
    model.save_pretrained(folder)
    SimVQImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        size_divisor=model.config.downsample_factor,
    ).save_pretrained(folder)
    return folder


def build_image_recipe(
    model: ImageModelSettings,
    data: ImageDataConfig,
    loss: ImageLossSettings,
    *,
    batch_size: int,
    seed: int,
) -> ImageRecipe:
    """Build the recipe from settings: open the dataset and load the perceptual network.

    Raises:
        SettingsError: if the resolution is no multiple of the down-sampling factor, or too small.
        MissingWeights: if LPIPS is asked for and its weights cannot be had.
    """
    tokenizer = model.build(data)
    config = tokenizer.config
    if data.resolution % config.downsample_factor:
        raise SettingsError(
            f"resolution must be a multiple of the down-sampling factor {config.downsample_factor}, "
            f"got {data.resolution}"
        )
    _check_size(data, loss)
    perceptual = None if loss.perceptual == "none" else load_lpips(loss.perceptual)

    def loader(split: str | None, train: bool) -> DataLoader | None:
        if split is None:
            return None
        return build_image_dataloader(data, split, batch_size=batch_size, train=train, seed=seed)

    sizes = loss.discriminator_sizes()
    discriminator = PatchDiscriminator(**sizes)
    if loss.sync_batch_norm:
        if not torch.cuda.is_available():
            raise SettingsError("sync_batch_norm: torch has it for GPUs alone: leave it out")
        discriminator = nn.SyncBatchNorm.convert_sync_batchnorm(discriminator)
    model.go_on_with(discriminator, sizes, loss.adversarial_weight)
    recipe = ImageRecipe(
        tokenizer,
        discriminator,
        ImageLoss(
            perceptual,
            reconstruction_weight=loss.reconstruction_weight,
            perceptual_weight=loss.perceptual_weight,
            colour_weight=loss.colour_weight,
            adversarial_weight=loss.adversarial_weight,
            adaptive_scale=loss.adaptive_scale,
            discriminator_start=loss.discriminator_start,
            lecam_weight=loss.lecam_weight,
            commitment_weight=loss.commitment_weight,
        ),
        perceptual,
        loader(data.train_split, train=True),
        loader(data.validation_split, train=False),
        data.resolution,
    )
    recipe.beginning, recipe.discriminator_sizes = model, sizes
    return recipe


def _resolution(source: str) -> int | None:
    """Return the side that a model was trained at, as its processor tells; None if it has none."""
    try:
        return trained_resolution(SimVQImageProcessor.from_pretrained(source))
    except (OSError, ValueError, KeyError, TypeError):  # none was saved with it, or a broken one
        return None


def _check_size(data: ImageDataConfig, loss: ImageLossSettings) -> None:
    layers = loss.discriminator_layers
    smallest = {
        f"the discriminator (discriminator_layers={layers})": smallest_for_discriminator(layers)
    }
    if loss.perceptual != "none":
        smallest[f"LPIPS (perceptual={loss.perceptual})"] = LPIPS[loss.perceptual]
    if data.validation_split is not None:
        smallest["SSIM, a figure of the validation,"] = SSIM
    check_resolution(data.resolution, smallest)
