"""Recipe of the generators: a transformer over the codes of a tokenizer, of images or of audio."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, AutoModel, PreTrainedModel

from modeling_simvq import (
    SimVQAudioGenerationConfig,
    SimVQForAudioGeneration,
    SimVQForImageGeneration,
    SimVQImageGenerationConfig,
    SimVQImageProcessor,
)
from modeling_simvq.code_model import CodeModelOutput
from modeling_simvq.several_quantizers import levels_of
from training.data.codes import (
    AudioTokenDecoder,
    ImageTokenDecoder,
    TokenDataConfig,
    TokenLayout,
    open_codes,
    read_layout,
)
from training.data.loader import build_dataloader
from training.loop.recipe import Validation
from training.loop.settings import LoopSettings
from training.loop.steps import LossStepper
from training.loop.validation import each_once
from training.recipes.drawn_samples import SampleSettings, sample_pictures, sample_sounds
from training.recipes.starting_model import GoesOn, adopt_sizes, load_source
from training.runtime.float64 import float64_device, to_float64
from training.runtime.settings import SettingsError, setting, settings_of
from training.runtime.sharding import is_sharding
from training.tokenization.encoders import MANIFEST, weights_hash

logger = get_logger(__name__)


MODEL_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
MODEL_FIELDS += ("num_key_value_heads", "attention_dropout", "tie_word_embeddings", "code_factors")


@dataclass
class GeneratorModelSettings(settings_of(SimVQImageGenerationConfig, *MODEL_FIELDS), GoesOn):
    """The code model (fields of SimVQImageGenerationConfig)."""

    tokenizer: str | None = setting(
        None,
        "what made the codes, a folder or a name on the Hub: to see samples, and for the pipeline",
    )
    init_from: str | None = setting(
        None, "begin from this generator, a folder or a name on the Hub; its sizes are taken"
    )
    codebook_size: int | None = setting(None, "K, number of codes; by default the tokenizer's")
    num_classes: int | None = setting(None, "images: by default those that the dataset names")

    def config(
        self, layout: TokenLayout, codebook_size: int, max_codes: int
    ) -> SimVQImageGenerationConfig | SimVQAudioGenerationConfig:
        """The model's configuration, validated."""
        values = {name: getattr(self, name) for name in MODEL_FIELDS}
        values |= {"codebook_size": codebook_size, "num_quantizers": layout.num_quantizers}
        try:
            if layout.grid_size is None:
                return SimVQAudioGenerationConfig(max_codes=max_codes, **values)
            return SimVQImageGenerationConfig(
                num_classes=len(layout.class_names),
                id2label=dict(enumerate(layout.class_names)),
                grid_size=layout.grid_size,
                **values,
            )
        except ValueError as error:
            raise SettingsError(str(error)) from error

    def build(
        self, layout: TokenLayout, codebook_size: int | None, max_codes: int
    ) -> SimVQForImageGeneration | SimVQForAudioGeneration:
        """Build the code model, from init_from if it is set.

        Args:
            codebook_size: K; None takes that of init_from.

        Raises:
            SettingsError: if init_from cannot be loaded, or has other sizes than the codes or the settings.
        """
        audio = layout.grid_size is None
        model_class = SimVQForAudioGeneration if audio else SimVQForImageGeneration
        if self.init_from is None:
            return model_class(self.config(layout, codebook_size, max_codes))
        source = load_source(model_class, self.init_from, self.recorded)
        adopt_sizes(self, source.config)
        if codebook_size is None:
            codebook_size = source.config.codebook_size
        config, theirs = self.config(layout, codebook_size, max_codes), source.config
        names = ("codebook_size", "num_quantizers")
        names += ("max_codes",) if audio else ("grid_size", "num_classes")
        wrong = [
            f"{name} is {getattr(config, name)} and the model's is {getattr(theirs, name)}"
            for name in names
            if getattr(config, name) != getattr(theirs, name)
        ]
        if wrong:
            raise SettingsError(
                f"init_from: {self.init_from} is for other codes: {'; '.join(wrong)}"
            )
        model = model_class(config)  # its classes have the names of this dataset
        model.load_state_dict(source.state_dict())
        return model


@dataclass
class GeneratorLoopSettings(LoopSettings):
    """The run: how long, how fast, what is kept. Steps are optimiser steps."""

    output_dir: str = setting(
        "runs/simvq_generator", "folder of checkpoints, samples, logs and the final model"
    )
    epochs: int = setting(300, "passes over the codes, unless max_steps ends the run before")
    adam_betas: list[float] = setting([0.9, 0.95], "AdamW's betas")
    weight_decay: float = setting(0.05, "AdamW's decay of matrices, not of norms and biases")
    lr_schedule: str = setting("cosine", "constant or cosine, after the warm-up")
    warmup_steps: int = setting(1000, "linear warm-up from 0")
    max_grad_norm: float | None = setting(1.0, "clip the gradients' norm")


class GeneratorRecipe:
    """See training.loop.recipe.Recipe.

    Args:
        tokenizer: what made the codes; None to do without samples and pipeline.
        processor: of a tokenizer of images.
    """

    stepper = LossStepper
    headline = ("loss", -1)
    loss_figure = "generator/total"
    remarks = ()
    batch_counts = ("unreadable",)
    companions: tuple = ()
    frozen: tuple = ()
    of_images = False
    forward_methods = ("loss", "logits")  # of the embedding of codes

    def __init__(
        self,
        model: SimVQForImageGeneration | SimVQForAudioGeneration,
        tokenizer: PreTrainedModel | None,
        processor: SimVQImageProcessor | None,
        train_loader: DataLoader,
        validation_loader: DataLoader | None,
        samples: SampleSettings,
    ):
        self.model, self.samples = model, samples
        self.tokenizer, self.processor = tokenizer, processor
        self.train_loader, self.validation_loader = train_loader, validation_loader

    @property
    def modules(self) -> dict[str, nn.Module]:
        return {"generator": self.model}

    def arguments(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the arguments that the model is called with."""
        return {name: batch[name] for name in batch if name not in ("valid", "unreadable")}

    def step_figures(self, output: CodeModelOutput) -> dict[str, Tensor]:
        """Return figures of a step beside its loss: those of each quantizer's codes, if there are several."""
        losses = output.level_losses
        if losses is None:
            return {}
        return {f"loss_level_{n}": loss.detach() for n, loss in enumerate(losses, start=1)}

    def batch_weight(self, batch: dict[str, Tensor]) -> Tensor | None:
        """Share of the places that hold codes: the loss is a mean over these, and short clips have few."""
        mask = batch.get("audio_codes_mask")
        return None if mask is None else mask.float().mean()

    @torch.no_grad()
    def validate(
        self, model: nn.Module, loader: DataLoader, accelerator: Accelerator
    ) -> Validation:
        levels = model.config.num_quantizers
        # The loss of each quantizer's codes, and how many positions there are.
        sums = torch.zeros(
            levels + 1, dtype=torch.float64, device=float64_device(accelerator.device)
        )
        for batch, counts in each_once(loader, accelerator, "validating"):
            output = model(**self.arguments(batch))
            losses = output.loss[None] if levels == 1 else output.level_losses
            counted = batch.get("audio_codes_mask")
            if counted is None:
                counted = torch.ones_like(batch["image_codes"])
            if counts:
                number = to_float64(counted.sum())
                sums += torch.cat([to_float64(losses) * number, number[None]])
        *totals, count = accelerator.reduce(sums).tolist()
        if not count:
            logger.warning("the validation set has no row that can be read: no figures")
            return Validation({})
        result = Validation(loss_figures([total / count for total in totals]))
        # All ranks make the same samples of a model sharded, none of which could do it alone.
        samples_here = accelerator.is_main_process or is_sharding(accelerator)
        if self.tokenizer is not None and self.samples.samples and samples_here:
            tokenizer = self.tokenizer.to(accelerator.device)
            if isinstance(model, SimVQForImageGeneration):
                result.pictures = sample_pictures(model, tokenizer, self.samples)
            else:
                result.sounds = sample_sounds(model, tokenizer, self.samples)
                result.sampling_rate = tokenizer.config.sampling_rate
        return result

    def save(self, model: nn.Module, folder: Path) -> Path:
        return save_generator(model, folder, self.tokenizer, self.processor)


def save_generator(
    model: nn.Module,
    folder: Path,
    tokenizer: PreTrainedModel | None,
    processor: SimVQImageProcessor | None,
) -> Path:
    """Write the generator and, with a processor of images, the pipeline of all three beside it.

    Returns:
        What is to be published: the pipeline's folder if there is one, otherwise the generator's.
    """
    model.save_pretrained(folder)
    if processor is None:
        return folder
    from modeling_simvq import SimVQImagePipeline  # takes long to import

    pipeline = SimVQImagePipeline(tokenizer, model, processor)
    pipeline.save_pretrained(folder.with_name("pipeline"))
    return folder.with_name("pipeline")


def loss_figures(losses: list[float]) -> dict[str, float]:
    """Mean losses of the codes of each quantizer in nats, as figures: of all codes, and of each one's."""
    loss = sum(losses) / len(losses)
    figures = {
        "loss": loss,
        "bits_per_code": loss / math.log(2),
        "code_perplexity": _perplexity(loss),
    }
    for number, one in enumerate(losses if len(losses) > 1 else [], start=1):
        figures |= {f"loss_level_{number}": one, f"perplexity_level_{number}": _perplexity(one)}
    return figures


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # more is no float


def build_generator_recipe(
    model: GeneratorModelSettings,
    data: TokenDataConfig,
    samples: SampleSettings,
    *,
    batch_size: int,
    seed: int,
) -> GeneratorRecipe:
    """Build the recipe from settings: open the codes and load the tokenizer.

    Raises:
        SettingsError: if the codes do not fit the tokenizer, or it is not told how many there are.
    """
    train_source = open_codes(data, data.train_split)
    layout = read_layout(train_source, data, model.num_classes)
    tokenizer, processor, codebook_size = None, None, model.codebook_size
    if model.tokenizer is not None:
        tokenizer = _load_tokenizer(model.tokenizer, layout)
        _check_origin(data, tokenizer)
        codebook_size = tokenizer.config.codebook_size
        if model.codebook_size not in (None, codebook_size):
            raise SettingsError(
                f"codebook_size is {model.codebook_size}, but the tokenizer has {codebook_size} codes"
            )
        quantizers = tokenizer.config.num_quantizers
        if layout.num_quantizers > quantizers:
            raise SettingsError(
                f"tokenizer: the dataset holds codes of {layout.num_quantizers} quantizers, the tokenizer has "
                f"{quantizers}"
            )
        if layout.grid_size is not None:
            processor = AutoImageProcessor.from_pretrained(model.tokenizer)
    if codebook_size is None and model.init_from is None:
        raise SettingsError("codebook_size: set it, or name the tokenizer, tokenizer=...")
    generator = model.build(layout, codebook_size, data.clip_codes)
    config = generator.config
    codebook_size = config.codebook_size
    if layout.grid_size is None:
        decoder = AudioTokenDecoder(data.clip_codes, codebook_size, layout.num_quantizers)
    else:
        decoder = ImageTokenDecoder(
            layout.grid_size,
            codebook_size,
            config.null_class,
            data.label_column,
            data.label_dropout,
            layout.num_quantizers,
        )
    if tokenizer is not None and model.init_from is None:
        generator.arrange_codes(_codebooks(tokenizer, layout.num_quantizers))

    train_loader = build_dataloader(
        train_source, data.train_split, data, decoder, batch_size=batch_size, train=True, seed=seed
    )
    validation_loader, split = None, data.validation_split
    if split is not None:
        validation_loader = build_dataloader(
            open_codes(data, split),
            split,
            data,
            decoder,
            batch_size=batch_size,
            train=False,
            seed=seed,
        )
    return GeneratorRecipe(
        generator,
        tokenizer,
        processor,
        train_loader,
        validation_loader,
        samples,
    )


def _codebooks(tokenizer: PreTrainedModel, count: int) -> Tensor | list[Tensor]:
    codebooks = [level.codebook() for level in levels_of(tokenizer.quantizer)[:count]]
    return codebooks[0] if count == 1 else codebooks


def _check_origin(data: TokenDataConfig, tokenizer: PreTrainedModel) -> None:
    """Codes of another tokenizer would train as well, and decode to noise. A folder here tells."""
    path = Path(data.dataset) / MANIFEST
    try:
        weights = json.loads(path.read_text())["weights"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if weights != weights_hash(tokenizer):
        raise SettingsError(
            f"tokenizer: the codes in {data.dataset} are not of this tokenizer, but of one whose weights have "
            f"the hash {weights} ({MANIFEST})"
        )


def _load_tokenizer(name: str, layout: TokenLayout) -> PreTrainedModel:
    tokenizer = AutoModel.from_pretrained(name).eval().requires_grad_(False)
    wanted = "simvq_audio" if layout.grid_size is None else "simvq_image"
    if tokenizer.config.model_type != wanted:
        raise SettingsError(
            f"tokenizer: {name} is of type {tokenizer.config.model_type}, the codes need {wanted}"
        )
    return tokenizer
