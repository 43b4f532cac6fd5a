"""Codes for training generators: what tokenize_dataset wrote, in a folder or on the Hub, streamed or not."""

from dataclasses import dataclass
from typing import ClassVar

import datasets
import numpy as np
import torch
from torch import Tensor

from hub_cards.dataset_card import CODE_COLUMNS
from training.data.reader import UnreadableSample
from training.data.source import DataSettings, Kind, Source, open_table
from training.runtime.settings import SettingsError, at_least, setting


@dataclass
class TokenDataConfig(DataSettings):
    """The codes, as tokenize_dataset.py makes them."""

    kind: ClassVar[Kind] = Kind(
        datasets.List, "parquet", "dataset", "rows of codes", "rows of codes"
    )

    dataset: str = setting("", "folder that tokenize_dataset wrote, or its name on the Hub")
    label_column: str | None = setting(
        "label", "images: column of the classes; null to do without them"
    )
    label_dropout: float = setting(
        0.1, "images: share of samples whose class is hidden, for classifier-free guidance"
    )
    clip_codes: int = setting(
        750, "audio: codes of a random crop, ten seconds at 75 a second; shorter clips are whole"
    )

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "clip_codes")
        if not self.dataset:
            raise SettingsError("dataset: must be given, dataset=...; tokenize_dataset.py makes it")
        if not 0 <= self.label_dropout <= 1:
            raise SettingsError(f"label_dropout must lie in [0, 1], got {self.label_dropout}")

    @property
    def column(self) -> str:
        """Return the name of the codes' column in messages."""
        return " or ".join(CODE_COLUMNS)


def open_codes(config: TokenDataConfig, split: str) -> Source:
    """Open a split: the codes and, of images, the classes.

    Raises:
        SettingsError: if the source, the split or a column is not there, naming what is.
    """
    source = open_table(config, split)
    names = source.column_names or list(next(iter(source), {}))
    codes = next((name for name in CODE_COLUMNS if name in names), None)
    if codes is None:
        raise SettingsError(
            f"dataset: {config.dataset} has no column {config.column}, it has {', '.join(names)}; "
            "tokenize_dataset.py makes one"
        )
    wanted = [codes]
    if codes == "image_codes" and config.label_column is not None:
        if config.label_column not in names:
            raise SettingsError(
                f"label_column: {config.dataset} has no column {config.label_column!r}, it has "
                f"{', '.join(names)}; label_column=null does without classes"
            )
        wanted.append(config.label_column)
    return source.select_columns(wanted)


@dataclass
class TokenLayout:
    """Settings of a dataset of codes.

    Attributes:
        grid_size: (h, w) of images; None for audio.
        class_names: of the classes; empty if there are none.
        num_quantizers: Q, codes of a position.
    """

    grid_size: tuple[int, int] | None
    class_names: list[str]
    num_quantizers: int = 1


def read_layout(source: Source, config: TokenDataConfig, num_classes: int | None) -> TokenLayout:
    """Find out what the training split holds.

    Args:
        source: the split, of open_codes.
        num_classes: for a label column of plain integers, which does not tell.

    Raises:
        SettingsError: if the split is empty, or nobody says how many classes there are.
    """
    row = next(iter(source), None)
    if row is None:
        raise SettingsError(f"train_split: {config.train_split!r} of {config.dataset} is empty")
    if "audio_codes" in row:
        shape = np.shape(row["audio_codes"])
        return TokenLayout(None, [], shape[0] if len(shape) == 2 else 1)
    shape = np.asarray(row["image_codes"]).shape
    if len(shape) not in (2, 3):
        raise SettingsError(
            f"dataset: image_codes of {config.dataset} holds arrays of shape {shape}, not (h, w) or (Q, h, w)"
        )
    grid, levels = shape[-2:], shape[0] if len(shape) == 3 else 1
    if config.label_column is None:
        return TokenLayout(grid, [], levels)
    feature = (source.features or {}).get(config.label_column)
    if isinstance(feature, datasets.ClassLabel):
        if num_classes not in (None, feature.num_classes):
            raise SettingsError(
                f"num_classes is {num_classes}, but {config.label_column!r} has {feature.num_classes}"
            )
        return TokenLayout(grid, feature.names, levels)
    if num_classes is None:
        raise SettingsError(
            f"num_classes: column {config.label_column!r} does not tell how many there are; set it, or "
            "label_column=null"
        )
    return TokenLayout(grid, [str(number) for number in range(num_classes)], levels)


@dataclass(frozen=True)
class ImageTokenDecoder:
    """Rows to {"image_codes": (h, w) int64, "class_labels": () int64}; see training.data.loader.Decoder.

    Attributes:
        num_quantizers: Q; above 1 codes are (Q, h, w).
        null_class: label of "no class": of all samples if label_column is None, of those whose label is null
            or negative, and in training of a share label_dropout of the rest.
    """

    grid_size: tuple[int, int]
    codebook_size: int
    null_class: int
    label_column: str | None
    label_dropout: float
    num_quantizers: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of an image's codes."""
        several = () if self.num_quantizers == 1 else (self.num_quantizers,)
        return (*several, *self.grid_size)

    def read(self, row: dict, name: str, generator: torch.Generator | None) -> dict[str, Tensor]:
        codes = _codes(row["image_codes"], name, self.codebook_size)
        if codes.shape != self.shape:
            raise UnreadableSample(
                f"{name}: codes of shape {tuple(codes.shape)}, the first row's is {self.shape}"
            )
        label = self.null_class
        if self.label_column is not None:
            label = self._label(row[self.label_column], name)
        if generator is not None and torch.rand((), generator=generator) < self.label_dropout:
            label = self.null_class
        return {"image_codes": codes, "class_labels": torch.tensor(label)}

    def _label(self, label, name: str) -> int:
        if label is None:
            return self.null_class
        if isinstance(label, bool) or not isinstance(label, int) or label >= self.null_class:
            raise UnreadableSample(f"{name}: class {label!r}, there are {self.null_class}")
        return label if label >= 0 else self.null_class

    def blank(self) -> dict[str, Tensor]:
        codes = torch.zeros(self.shape, dtype=torch.int64)
        return {"image_codes": codes, "class_labels": torch.tensor(self.null_class)}


@dataclass(frozen=True)
class AudioTokenDecoder:
    """Rows to {"audio_codes": (Q, T), "audio_codes_mask": (1, T)} int64; see training.data.loader.Decoder.

    In training T = clip_codes codes from a random place, in validation the first ones. Shorter clips are
    padded; the mask is 0 there.
    """

    clip_codes: int
    codebook_size: int
    num_quantizers: int = 1

    def read(self, row: dict, name: str, generator: torch.Generator | None) -> dict[str, Tensor]:
        codes = _codes(row["audio_codes"], name, self.codebook_size)
        levels, shape = self.num_quantizers, tuple(codes.shape)
        if shape[:-1] != (() if levels == 1 else (levels,)) or not codes.numel():
            wanted = "(T,)" if levels == 1 else f"({levels}, T)"
            raise UnreadableSample(f"{name}: codes of shape {shape}, not {wanted}")
        codes = codes.reshape(levels, -1)
        spare = max(0, codes.shape[1] - self.clip_codes)
        start = 0
        if generator is not None:
            start = int(torch.randint(spare + 1, (), generator=generator))
        clip, sample = codes[:, start : start + self.clip_codes], self.blank()
        sample["audio_codes"][:, : clip.shape[1]] = clip
        sample["audio_codes_mask"][0, : clip.shape[1]] = 1
        return sample

    def blank(self) -> dict[str, Tensor]:
        codes = torch.zeros(self.num_quantizers, self.clip_codes, dtype=torch.int64)
        return {"audio_codes": codes, "audio_codes_mask": torch.zeros_like(codes[:1])}


def _codes(values, name: str, codebook_size: int) -> Tensor:
    """Codes of a row, each checked: a dataset may be broken, or of another tokenizer."""
    try:
        codes = np.asarray(values)
        whole = codes.dtype.kind in "iu"
    except ValueError:  # rows of a grid that differ in length
        whole = False
    if not whole:
        raise UnreadableSample(f"{name}: no codes, which are whole numbers")
    if codes.size and not 0 <= codes.min() <= codes.max() < codebook_size:
        wrong = codes.min() if codes.min() < 0 else codes.max()
        raise UnreadableSample(
            f"{name}: code {wrong}; those of the tokenizer are 0 to {codebook_size - 1}"
        )
    return torch.from_numpy(codes.astype(np.int64))
