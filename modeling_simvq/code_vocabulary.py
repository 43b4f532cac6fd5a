"""Place of codes in the vocabulary of a language model: tokens, ids and back, and sequences that stay whole."""

import math
import re
from collections import Counter
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
        num_quantizers: Q, codes of a position. Above 1 each quantizer has K tokens of its own: code k of the
            first one is <|image_level1_k|>, and of quantizer q, from 1, the id is offset + (q - 1) * K + k.
            A position's Q codes follow each other, first to last, and then come those of the next position.
    """

    name: str
    start: int
    end: int
    offset: int
    codebook_size: int
    factors: tuple[int, int] | None = None
    num_quantizers: int = 1

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
        pattern = re.compile(rf"<\|{re.escape(name)}_({KINDS})_\d+\|>")
        found = Counter(m[1] for token in vocabulary if (m := pattern.fullmatch(token)))
        levels = [kind for kind in found if kind.startswith("level")]
        factorised, several = (
            "first" in found and "code" not in found,
            levels and "code" not in found,
        )
        kinds = ("first", "second") if factorised else ("code",)
        if several:
            kinds = tuple(f"level{number}" for number in range(1, len(levels) + 1))
        offset = _find(vocabulary, f"<|{name}_{kinds[0]}_0|>", name)
        sizes, following = [], offset
        for kind in kinds:
            present = found[kind]
            for number in range(max(present, 1)):
                token = f"<|{name}_{kind}_{number}|>"
                if vocabulary.get(token) != following:
                    raise ValueError(
                        f"{token} should have the id {following:,}, the tokenizer gives it "
                        f"{vocabulary.get(token)}: ids of codes must follow one another"
                    )
                following += 1
            sizes.append(present)
        if several:
            if len(set(sizes)) > 1:
                raise ValueError(f"quantizers of {name} have different numbers of tokens: {sizes}")
            return cls(name, start, end, offset, sizes[0], num_quantizers=len(sizes))
        factors = tuple(sizes) if factorised else None
        return cls(name, start, end, offset, math.prod(sizes), factors)

    @property
    def tokens_per_code(self) -> int:
        """Tokens of a position: 1, 2 with factors, or those of its Q codes."""
        return self.num_quantizers if self.factors is None else 2

    @property
    def code_tokens(self) -> int:
        """Tokens of all codes in the vocabulary, from the id offset on: K, K1 + K2 or Q * K."""
        return sum(self.kinds.values())

    @property
    def kinds(self) -> dict[str, int]:
        """The kinds of tokens of a position in their order, and how many there are of each."""
        if self.factors is not None:
            return dict(zip(("first", "second"), self.factors, strict=True))
        if self.num_quantizers == 1:
            return {"code": self.codebook_size}
        numbers = range(1, self.num_quantizers + 1)
        return {f"level{number}": self.codebook_size for number in numbers}

    def token(self, number: int) -> str:
        """The token whose id is offset + number."""
        for kind, count in self.kinds.items():
            if number < count:
                return f"<|{self.name}_{kind}_{number}|>"
            number -= count
        raise ValueError(
            f"{self.name} has {self.code_tokens:,} tokens of codes, none of a larger number"
        )

    def to_ids(self, codes: Tensor) -> Tensor:
        """Codes to token ids.

        Args:
            codes: (B, ...) integers of any type in [0, K), such as image_codes (B, h, w) or audio_codes
                (B, 1, T); read row by row. With Q codes a position (B, Q, ...).

        Returns:
            (B, 1 + n + 1) int64: start, the n codes of a sample, end; (B, 1 + 2 * n + 1) with factors,
            (B, 1 + Q * n + 1) of n positions with Q codes each.

        Raises:
            ValueError: if a code lies outside [0, K), they are no integers, or not of Q quantizers.
        """
        codes = integers("codes", codes)
        levels, shape = self.num_quantizers, tuple(codes.shape)
        if levels > 1 and (codes.ndim < 3 or shape[1] != levels):
            raise ValueError(f"codes must be integers (B, {levels}, ...), got shape {shape}")
        if codes.ndim < 2:
            raise ValueError(f"codes must be integers (B, ...), got shape {shape}")
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
        elif levels > 1:
            first = self.codebook_size * torch.arange(levels, device=flat.device)
            flat = (flat.unflatten(1, (levels, -1)).transpose(1, 2) + first).flatten(1)
        return torch.cat([start, flat + self.offset, end], dim=1)

    def to_codes(self, ids: Tensor, shape: tuple[int, ...] | None = None) -> Tensor | list[Tensor]:
        """Codes of all the images or clips in sequences of tokens, in reading order; text is passed over.

        Args:
            ids: (L,) or (B, L) integers.
            shape: of the codes of each, such as (h, w) or (1, T), or (Q, h, w); None where lengths differ.

        Returns:
            (N, *shape) int64, N in all the sequences together; a list of N tensors (n,), or (Q, n), without a
            shape.

        Raises:
            ValueError: if a start has no end, an end no start, something other than codes stands between them,
                codes stand outside, factors are not first, second, first, ..., quantizers not in their order,
                or their number does not fit the shape; naming row and position.
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
        if self.tokens_per_code > 1:
            self._refuse_order(rows, is_code)
        if len(starts) != len(ends):
            row = int((depth[:, -1] != 0).nonzero()[0])
            position = int(starts[starts[:, 0] == row][-1, 1])
            found = (rows.shape[1] - position - 1) // self.tokens_per_code
            raise ValueError(
                f"the {self.name} that starts in row {row} at position {position} is truncated: "
                f"{found:,} codes and no {boundary_tokens(self.name)[1]}"
            )
        lengths = (ends[:, 1] - starts[:, 1] - 1) // self.tokens_per_code
        codes = rows[is_code] - self.offset
        if self.factors is not None:
            cells, places = self.factors
            codes = codes[::2] * places + codes[1::2] - cells
        levels = self.num_quantizers
        codes, lengths = codes % self.codebook_size, lengths * levels
        if shape is None:
            samples = codes.split(lengths.tolist())
            return [one.reshape(-1, levels).T if levels > 1 else one for one in samples]
        if levels > 1 and (not shape or shape[0] != levels):
            raise ValueError(
                f"shape must begin with {levels}, the codes of a position, got {shape}"
            )
        wanted = int(torch.Size(shape).numel())
        wrong = lengths != wanted
        if wrong.any():
            row, position = starts[wrong][0].tolist()
            raise ValueError(
                f"the {self.name} that starts in row {row} at position {position} has "
                f"{int(lengths[wrong][0]):,} codes, of the shape {tuple(shape)} are {wanted:,}"
            )
        return (
            codes.reshape(len(lengths), wanted // levels, levels)
            .transpose(1, 2)
            .reshape(-1, *shape)
        )

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

    def _refuse_order(self, rows: Tensor, is_code: Tensor) -> None:
        """Raise unless each position's tokens are those of all kinds, in their order, after each start."""
        parts, whole = ("code of a quantizer", "codes of a position")
        if self.factors is not None:
            parts, whole = ("factor", "two factors of a code")
        ends = torch.tensor(list(self.kinds.values()), device=rows.device).cumsum(0)
        kind = torch.bucketize(rows - self.offset, ends, right=True)
        place = torch.arange(rows.shape[1], device=rows.device).expand_as(rows)
        began = torch.where(rows == self.start, place, 0).cummax(1).values
        wanted = (place - began - 1) % self.tokens_per_code
        self._refuse(rows, is_code & (kind != wanted), f"is a {parts} out of turn")
        halved = (rows == self.end) & (wanted != 0)
        self._refuse(rows, halved, f"stands between the {whole}")

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
        length: codes, or positions, of each image or clip; None lets the model choose when it ends.
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
        turn, first = made % v.tokens_per_code, v.offset
        for number, count in enumerate(v.kinds.values()):
            wanted = inside & (turn == number)
            allowed[:, first : first + count] = (wanted & ~full if number == 0 else wanted)[:, None]
            first += count
        allowed[:, v.end] = full if self.length else inside & (turn == 0)
        return scores.masked_fill(~allowed, -torch.inf)


# Of the tokens that add_code_tokens gives names to, as a regular expression.
KINDS = r"code|first|second|level\d+"


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
