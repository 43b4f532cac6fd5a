"""Configurations of the generators: Llama over the codes of a SimVQ tokenizer."""

import math

from transformers import LlamaConfig

from .configuration_checks import (
    MOST_LAYERS,
    CheckedConfig,
    Integers,
    Number,
    at_least,
    at_most,
    check_parameters,
    codebook_parameters,
    described,
    not_negative,
    pair,
    probability,
    strict_fields,
)

MOST_CLASSES = 1_000_000


class SimVQGenerationConfig(CheckedConfig):
    """Base of both generators' configurations: the codes, and the sizes of Llama.

    The defaults are a model of 85 M parameters without its tables of codes.
    """

    num_start_tokens = 1  # what a sequence may begin with; their ids follow those of the codes

    codebook_size: int = described(1024, "K of the tokenizer", at_least(1))
    hidden_size: int = described(768, "width of the transformer", at_least(1))
    intermediate_size: int = described(2048, "width inside its feed-forward layers", at_least(1))
    num_hidden_layers: int = described(12, "layers", at_least(1), at_most(MOST_LAYERS))
    num_attention_heads: int = described(12, "attention heads of a layer", at_least(1))
    num_key_value_heads: int | None = described(
        None, "heads of keys and values; all by default", at_least(1)
    )
    attention_dropout: Number = described(0.0, "dropout of attention weights", probability)
    rms_norm_eps: Number = described(1e-6, "epsilon of the norms", not_negative)
    rope_theta: Number = described(10000.0, "base of the rotary positions", not_negative)
    initializer_range: Number = described(
        0.02, "standard deviation of the weights at the start", not_negative
    )
    tie_word_embeddings: bool = described(False, "predict codes with the vectors that embed them")
    # Tables of K1 + K2 rows in place of K: a code's vector is the sum of two (see FactorizedCodes).
    code_factors: Integers | None = described(
        None, "[K1, K2] with K1 * K2 = K: predict a code in two parts, for large K", pair
    )

    num_quantizers: int = described(
        1,
        "Q, codes of a position; above 1 they are predicted by a delay pattern",
        at_least(1),
        at_most(64),
    )

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Refuse sizes that do not fit each other, or would make too large a model."""
        if self.code_factors and math.prod(self.code_factors) != self.codebook_size:
            raise ValueError(
                "code_factors must be two numbers whose product is codebook_size = "
                f"{self.codebook_size}, got {self.code_factors}"
            )
        heads = self.num_attention_heads
        if self.hidden_size % (2 * heads):
            raise ValueError(
                f"hidden_size must be a multiple of 2 * num_attention_heads = {2 * heads} "
                f"(positions turn pairs of values), got {self.hidden_size}"
            )
        if heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads must divide num_attention_heads = {heads}, "
                f"got {self.num_key_value_heads}"
            )
        layer = (4 * self.hidden_size + 3 * self.intermediate_size) * self.hidden_size
        check_parameters(
            self.num_hidden_layers * layer
            + self.num_quantizers * codebook_parameters(self.codebook_size, self.hidden_size, {})
        )

    @property
    def codes_of_all(self) -> int | None:
        """Positions that every sample has codes at; None if samples differ in length."""
        return None

    @property
    def vocab_size(self) -> int:
        """Return what can be predicted: codes, and nothing else."""
        return self.codebook_size

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def longest_sequence(self) -> int:
        """Positions of a sequence, its start included."""
        raise NotImplementedError

    def llama_config(self) -> LlamaConfig:
        """Return the configuration of the transformer inside, without a vocabulary: the codes have a table."""
        config = LlamaConfig(
            vocab_size=1,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            attention_dropout=self.attention_dropout,
            rms_norm_eps=self.rms_norm_eps,
            initializer_range=self.initializer_range,
            max_position_embeddings=self.longest_sequence,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
        config._attn_implementation = self._attn_implementation
        return config


@strict_fields
class SimVQImageGenerationConfig(SimVQGenerationConfig):
    """Configuration of SimVQForImageGeneration: images of one size, a class each.

    ``id2label`` names the classes, ``{0: "tench", ...}``; LABEL_0 and so on if it is not given.
    """

    model_type = "simvq_image_generation"

    num_classes: int = described(
        1000,
        "classes of the images; 0 for images without classes",
        at_least(0),
        at_most(MOST_CLASSES),
    )
    grid_size: Integers = described((16, 16), "(h, w), codes of an image", pair)

    def __post_init__(self, **kwargs):
        names = self.id2label
        if names is None:
            names = {label: f"LABEL_{label}" for label in range(self.num_classes)}
        try:
            names = {int(label): str(name) for label, name in dict(names).items()}
        except (TypeError, ValueError):
            raise ValueError(f"id2label must map labels to names, got {names!r}") from None
        self.id2label, self.label2id = names, {name: label for label, name in names.items()}
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Refuse what SimVQGenerationConfig refuses, and names that are not those of the classes."""
        super().validate_architecture()
        if sorted(self.id2label) != list(range(self.num_classes)):
            raise ValueError(
                f"id2label must name the labels 0 to num_classes - 1 = {self.num_classes - 1}, "
                f"got {len(self.id2label)} names"
            )

    @property
    def null_class(self) -> int:
        """The label of "no class", = num_classes."""
        return self.num_classes

    @property
    def num_start_tokens(self) -> int:
        """The classes and the null class."""
        return self.num_classes + 1

    @property
    def codes_of_all(self) -> int:
        """Positions of an image, h * w."""
        return self.grid_size[0] * self.grid_size[1]

    @property
    def longest_sequence(self) -> int:
        """Positions of a sequence: the class and all codes, the last ones delayed."""
        return self.codes_of_all + self.num_quantizers


@strict_fields
class SimVQAudioGenerationConfig(SimVQGenerationConfig):
    """Configuration of SimVQForAudioGeneration: audio of any length up to a limit."""

    model_type = "simvq_audio_generation"

    max_codes: int = described(
        2048,
        "positions of the longest clip, in training and in generation; 27 seconds at 75 codes a second",
        at_least(1),
    )

    @property
    def longest_sequence(self) -> int:
        """Positions of a sequence: the start and all codes, the last ones delayed."""
        return self.max_codes + self.num_quantizers
