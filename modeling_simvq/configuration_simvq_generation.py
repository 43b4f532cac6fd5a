"""Configurations of the generators: Llama over the codes of a SimVQ tokenizer."""

from transformers import LlamaConfig, PreTrainedConfig

from .configuration_checks import (
    check_layers,
    check_parameters,
    codebook_parameters,
    number,
    refuse_misspelt,
    set_other_fields,
    truth,
    whole_number,
)

MOST_CLASSES = 1_000_000


class SimVQGenerationConfig(PreTrainedConfig):
    """What both generators have: the codes and Llama's sizes. The defaults are a model of 85 M parameters
    without its tables of codes.

    Args:
        codebook_size: K of the tokenizer.
        code_factors: (K1, K2) with K1 * K2 = K predicts a code as two numbers below K1 and K2, one after the
            other, and embeds it as the sum of two vectors: tables of K1 + K2 rows in place of K (see
            FactorizedCodes). None predicts the code at once.
        tie_word_embeddings: whether codes are predicted with the vectors that embed them.
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads,
            attention_dropout, rms_norm_eps, rope_theta, initializer_range: as of LlamaConfig.

    Raises:
        ValueError: naming the field, if a value is impossible.
        TypeError: if a field's name is misspelt.
    """

    num_start_tokens = 1  # what a sequence may begin with; their ids follow those of the codes

    def __init__(
        self,
        codebook_size: int = 1024,
        code_factors: tuple[int, int] | None = None,
        tie_word_embeddings: bool = False,
        hidden_size: int = 768,
        intermediate_size: int = 2048,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        num_key_value_heads: int | None = None,
        attention_dropout: float = 0.0,
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 10000.0,
        initializer_range: float = 0.02,
        **kwargs,
    ):
        self.codebook_size = whole_number("codebook_size", codebook_size)
        self.code_factors = None if code_factors is None else _pair("code_factors", code_factors)
        if self.code_factors and self.code_factors[0] * self.code_factors[1] != codebook_size:
            raise ValueError(
                f"code_factors must be two numbers whose product is codebook_size = {codebook_size}, "
                f"got {code_factors!r}"
            )
        self.tie_word_embeddings = truth("tie_word_embeddings", tie_word_embeddings)
        self.hidden_size = whole_number("hidden_size", hidden_size)
        self.intermediate_size = whole_number("intermediate_size", intermediate_size)
        self.num_hidden_layers = whole_number("num_hidden_layers", num_hidden_layers)
        self.num_attention_heads = whole_number("num_attention_heads", num_attention_heads)
        if num_key_value_heads is None:
            num_key_value_heads = num_attention_heads
        self.num_key_value_heads = whole_number("num_key_value_heads", num_key_value_heads)
        if hidden_size % (2 * num_attention_heads):
            raise ValueError(
                f"hidden_size must be a multiple of 2 * num_attention_heads = {2 * num_attention_heads} "
                f"(positions turn pairs of values), got {hidden_size}"
            )
        if num_attention_heads % num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads must divide num_attention_heads = {num_attention_heads}, "
                f"got {num_key_value_heads}"
            )
        self.attention_dropout = number("attention_dropout", attention_dropout)
        if self.attention_dropout >= 1:
            raise ValueError(f"attention_dropout must be below 1, got {attention_dropout}")
        self.rms_norm_eps = number("rms_norm_eps", rms_norm_eps)
        self.rope_theta = number("rope_theta", rope_theta)
        self.initializer_range = number("initializer_range", initializer_range)
        check_layers("num_hidden_layers", self.num_hidden_layers)
        layer = (4 * self.hidden_size + 3 * self.intermediate_size) * self.hidden_size
        check_parameters(
            self.num_hidden_layers * layer
            + codebook_parameters(self.codebook_size, self.hidden_size, {})
        )
        refuse_misspelt(kwargs, known=list(vars(self)))
        set_other_fields(super().__init__, kwargs)

    @property
    def vocab_size(self) -> int:
        """What can be predicted: codes, and nothing else."""
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
        """Of the transformer inside, without a vocabulary: its table is replaced by that of the codes."""
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


class SimVQImageGenerationConfig(SimVQGenerationConfig):
    """Of SimVQForImageGeneration: pictures of one size, a class each.

    Args:
        num_classes: classes of the pictures; 0 for pictures without classes.
        grid_size: (h, w), codes of a picture.
        id2label: names of the classes, ``{0: "tench", ...}``; LABEL_0 and so on if not given.
        kwargs: as of SimVQGenerationConfig.
    """

    model_type = "simvq_image_generation"

    def __init__(
        self,
        num_classes: int = 1000,
        grid_size: tuple[int, int] = (16, 16),
        id2label: dict[int, str] | None = None,
        **kwargs,
    ):
        self.num_classes = whole_number("num_classes", num_classes, low=0)
        if num_classes > MOST_CLASSES:
            raise ValueError(f"num_classes must be at most {MOST_CLASSES}, got {num_classes}")
        self.grid_size = _pair("grid_size", grid_size)
        if id2label is None:
            id2label = {label: f"LABEL_{label}" for label in range(num_classes)}
        try:
            names = {int(label): str(name) for label, name in dict(id2label).items()}
        except (TypeError, ValueError):
            raise ValueError(f"id2label must map labels to names, got {id2label!r}") from None
        if sorted(names) != list(range(num_classes)):
            raise ValueError(
                f"id2label must name the labels 0 to num_classes - 1 = {num_classes - 1}, "
                f"got {len(names)} names"
            )
        kwargs.pop("label2id", None)  # follows from the other
        label2id = {name: label for label, name in names.items()}
        super().__init__(id2label=names, label2id=label2id, **kwargs)

    @property
    def null_class(self) -> int:
        """The label of "no class", = num_classes."""
        return self.num_classes

    @property
    def num_start_tokens(self) -> int:
        """The classes and the null class."""
        return self.num_classes + 1

    @property
    def longest_sequence(self) -> int:
        """Positions of a sequence: the class and all codes."""
        return 1 + self.grid_size[0] * self.grid_size[1]


class SimVQAudioGenerationConfig(SimVQGenerationConfig):
    """Of SimVQForAudioGeneration: sound of any length up to a limit.

    Args:
        max_codes: codes of the longest clip, in training and in generation; at 75 codes a second the default is
            27 seconds.
        kwargs: as of SimVQGenerationConfig.
    """

    model_type = "simvq_audio_generation"

    def __init__(self, max_codes: int = 2048, **kwargs):
        self.max_codes = whole_number("max_codes", max_codes)
        super().__init__(**kwargs)

    @property
    def longest_sequence(self) -> int:
        """Positions of a sequence: the start and all codes."""
        return 1 + self.max_codes


def _pair(name: str, value) -> list[int]:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise ValueError(f"{name} must be two whole numbers, got {value!r}")
    return [whole_number(name, part) for part in value]
