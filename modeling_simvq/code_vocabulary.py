"""Place of codes in the vocabulary of a language model: tokens, ids and back, and sequences that stay whole."""

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from .integer_codes import integers


@dataclass(frozen=True)
class CodeVocabulary:
    """Place of a tokenizer's codes in the vocabulary of a language model.

    Attributes:
        name: of what the codes are codes, part of the tokens' names: <|image_start|>, <|image_code_7|>.
        start, end: ids of the tokens that stand before and after the codes.
        offset: id of code 0. Code k has the id offset + k.
        codebook_size: K, number of codes.
        factors: None, or (K1, K2) with K1 * K2 = K: a code k takes two tokens, <|image_first_3|> and
            <|image_second_5|>, with the ids offset + k // K2 and offset + K1 + k % K2.
    """

    name: str
    start: int
    end: int
    offset: int
    codebook_size: int
    factors: tuple[int, int] | None = None

    @classmethod
    def from_tokenizer(
        cls, tokenizer: PreTrainedTokenizerBase, name: str = "image"
    ) -> "CodeVocabulary":
        """Find the tokens that add_code_tokens added, in a tokenizer that may have been saved and loaded since.

        Raises:
            ValueError: if they are not there, or not one after another, naming the first that is amiss.
        """
        vocabulary = tokenizer.get_vocab()
        start, end = (_find(vocabulary, token, name) for token in boundary_tokens(name))
        factorised = code_token(name, 0) not in vocabulary and f"<|{name}_first_0|>" in vocabulary
        kinds = ("first", "second") if factorised else ("code",)
        offset = _find(vocabulary, f"<|{name}_{kinds[0]}_0|>", name)
        sizes, following = [], offset
        for kind in kinds:
            pattern = re.compile(rf"<\|{re.escape(name)}_{kind}_\d+\|>")
            present = sum(1 for token in vocabulary if pattern.fullmatch(token))
            for number in range(max(present, 1)):
                token = f"<|{name}_{kind}_{number}|>"
                if vocabulary.get(token) != following:
                    raise ValueError(
                        f"{token} should have the id {following:,}, the tokenizer gives it "
                        f"{vocabulary.get(token)}: ids of codes must follow one another"
                    )
                following += 1
            sizes.append(present)
        factors = tuple(sizes) if factorised else None
        return cls(name, start, end, offset, math.prod(sizes), factors)

    @property
    def tokens_per_code(self) -> int:
        """Tokens of a code: 1, or 2 with factors."""
        return 1 if self.factors is None else 2

    @property
    def code_tokens(self) -> int:
        """Tokens of all codes in the vocabulary, from the id offset on: K, or K1 + K2."""
        return self.codebook_size if self.factors is None else sum(self.factors)

    def token(self, number: int) -> str:
        """The token whose id is offset + number."""
        if self.factors is None:
            return code_token(self.name, number)
        cells = self.factors[0]
        kind, number = ("first", number) if number < cells else ("second", number - cells)
        return f"<|{self.name}_{kind}_{number}|>"

    def to_ids(self, codes: Tensor) -> Tensor:
        """Codes to token ids.

        Args:
            codes: (B, ...) integers of any type in [0, K), such as image_codes (B, h, w) or audio_codes
                (B, 1, T); read row by row.

        Returns:
            (B, 1 + n + 1) int64: start, the n codes of a sample, end; (B, 1 + 2 * n + 1) with factors.

        Raises:
            ValueError: if a code lies outside [0, K), or they are no integers.
        """
        codes = integers("codes", codes)
        if codes.ndim < 2:
            raise ValueError(f"codes must be integers (B, ...), got shape {tuple(codes.shape)}")
        flat = codes.flatten(1)
        bad = (flat < 0) | (flat >= self.codebook_size)
        if bad.any():
            raise ValueError(
                f"codes must lie in [0, {self.codebook_size:,}), got {int(flat[bad][0]):,}"
            )
        start, end = (flat.new_full((len(flat), 1), token) for token in (self.start, self.end))
        if self.factors is not None:
            cells, places = self.factors
            flat = torch.stack([flat // places, cells + flat % places], dim=2).flatten(1)
        return torch.cat([start, flat + self.offset, end], dim=1)

    def to_codes(self, ids: Tensor, shape: tuple[int, ...] | None = None) -> Tensor | list[Tensor]:
        """Codes of all the images or clips in sequences of tokens, in reading order; text is passed over.

        Args:
            ids: (L,) or (B, L) integers.
            shape: of the codes of each, such as (h, w) or (1, T); None where lengths differ.

        Returns:
            (N, *shape) int64, N in all the sequences together; a list of N tensors (n,) without a shape.

        Raises:
            ValueError: if a start has no end, an end no start, something other than codes stands between them,
                codes stand outside, factors are not first, second, first, ..., or their number does not fit the
                shape; naming row and position.
        """
        ids = integers("ids", ids)
        rows = ids if ids.ndim == 2 else ids[None]
        # Each start, with the end that must come before the next start of the row.
        starts, ends = (rows == self.start).nonzero(), (rows == self.end).nonzero()
        depth = (rows == self.start).long().cumsum(1) - (rows == self.end).long().cumsum(1)
        inside = (depth == 1) & (rows != self.start)
        is_code = self._is_code(rows)
        self._refuse(rows, depth < 0, f"{boundary_tokens(self.name)[1]} without a start before it")
        self._refuse(rows, depth > 1, "begins before the one before it has ended: truncated")
        self._refuse(
            rows, inside & ~is_code, f"is no code, but stands where the {self.name} has not ended"
        )
        self._refuse(rows, is_code & ~inside, "is a code outside of start and end")
        if self.factors is not None:
            self._refuse_order(rows, is_code, starts)
        if len(starts) != len(ends):
            row = int((depth[:, -1] != 0).nonzero()[0])
            position = int(starts[starts[:, 0] == row][-1, 1])
            found = (rows.shape[1] - position - 1) // len(self.factors or (0,))
            raise ValueError(
                f"the {self.name} that starts in row {row} at position {position} is truncated: "
                f"{found:,} codes and no {boundary_tokens(self.name)[1]}"
            )
        lengths = (ends[:, 1] - starts[:, 1] - 1) // self.tokens_per_code
        codes = rows[is_code] - self.offset
        if self.factors is not None:
            cells, places = self.factors
            codes = codes[::2] * places + codes[1::2] - cells
        if shape is None:
            return list(codes.split(lengths.tolist()))
        wanted = int(torch.Size(shape).numel())
        wrong = lengths != wanted
        if wrong.any():
            row, position = starts[wrong][0].tolist()
            raise ValueError(
                f"the {self.name} that starts in row {row} at position {position} has "
                f"{int(lengths[wrong][0]):,} codes, of the shape {tuple(shape)} are {wanted:,}"
            )
        return codes.reshape(-1, *shape)

    def mask(self, ids: Tensor) -> Tensor:
        """Mark the ids that are codes or their start and end; bool, the shape of ids. The others are text."""
        ids = integers("ids", ids)
        return self._is_code(ids) | (ids == self.start) | (ids == self.end)

    def to_text(self, codes: Tensor) -> list[str]:
        """Codes (B, ...) as text that the tokenizer reads as to_ids(codes), for prompts and chat templates."""
        start, end = boundary_tokens(self.name)
        flat = (self.to_ids(codes)[:, 1:-1] - self.offset).tolist()
        return [start + "".join(self.token(number) for number in row) + end for row in flat]

    def _is_code(self, ids: Tensor) -> Tensor:
        return (ids >= self.offset) & (ids < self.offset + self.code_tokens)

    def _refuse_order(self, rows: Tensor, is_code: Tensor, starts: Tensor) -> None:
        """Raise unless the codes' tokens are first, second, first, ... after each start, and come in pairs."""
        is_second = rows >= self.offset + self.factors[0]
        place = torch.arange(rows.shape[1], device=rows.device).expand_as(rows)
        began = torch.where(rows == self.start, place, 0).cummax(1).values
        wants_second = (place - began) % 2 == 0
        self._refuse(rows, is_code & (is_second != wants_second), "is a factor out of turn")
        halved = (rows == self.end) & wants_second
        self._refuse(rows, halved, "stands between the two factors of a code")

    def _refuse(self, rows: Tensor, bad: Tensor, fault: str) -> None:
        if bad.any():
            row, position = bad.nonzero()[0].tolist()
            raise ValueError(
                f"{self.name}: id {int(rows[row, position])} in row {row} at position {position} {fault}"
            )


class CodeLogitsProcessor(LogitsProcessor):
    """Whole images in what is generated: after a start come only codes, then the end; codes nowhere else.

    model.generate(..., logits_processor=[CodeLogitsProcessor(vocabulary, length=h * w)])

    Args:
        length: codes of each image or clip; None lets the model choose when it ends.
    """

    def __init__(self, vocabulary: CodeVocabulary, length: int | None = None):
        if length is not None and length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        self.vocabulary, self.length = vocabulary, length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V), those of forbidden tokens -inf, of sequences (B, L)."""
        v, width = self.vocabulary, input_ids.shape[1]
        position = torch.arange(width, device=input_ids.device)

        def last(token: int) -> Tensor:
            return torch.where(input_ids == token, position, -1).amax(1)

        started = last(v.start)
        inside = started > last(v.end)
        made = width - 1 - started
        full = inside & (made >= v.tokens_per_code * (self.length or width + 1))
        allowed = (~inside)[:, None].expand_as(scores).clone()
        first, last_of_codes = v.offset, v.offset + v.code_tokens
        if v.factors is None:
            whole = inside
            allowed[:, first:last_of_codes] = (inside & ~full)[:, None]
        else:
            whole = inside & (made % 2 == 0)
            second = first + v.factors[0]
            allowed[:, first:second] = (whole & ~full)[:, None]
            allowed[:, second:last_of_codes] = (inside & ~whole)[:, None]
        allowed[:, v.end] = full if self.length else whole
        return scores.masked_fill(~allowed, -torch.inf)


def code_token(name: str, code: int) -> str:
    """The token of a code, <|image_code_7|>."""
    return f"<|{name}_code_{code}|>"


def boundary_tokens(name: str) -> tuple[str, str]:
    return f"<|{name}_start|>", f"<|{name}_end|>"


def _find(vocabulary: dict[str, int], token: str, name: str) -> int:
    if token not in vocabulary:
        raise ValueError(
            f"the tokenizer has no {token}: add_code_tokens(tokenizer, model, K, name={name!r}) adds it"
        )
    return vocabulary[token]
