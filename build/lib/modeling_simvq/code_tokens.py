"""Codes as tokens of an existing language model: its vocabulary grows, and codes become ids and back.

    vocabulary = add_code_tokens(tokenizer, model, codebook_size=65536)
    ids = vocabulary.to_ids(codes)              # (B, h, w) -> (B, 1 + h * w + 1), between begin and end tokens
    codes = vocabulary.to_codes(ids, (h, w))    # and back, whatever text stands around them

The tokens are ordinary tokens of the tokenizer, so they survive save_pretrained by themselves, and
CodeVocabulary.from_tokenizer finds them again without any other file.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AddedToken, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from .integer_codes import integers

# New rows spread around the mean of the old ones with this share of the old rows' own spread. What the model
# says about text hardly changes (where logits of old tokens have a standard deviation s, those of new ones have
# s / 10), yet bfloat16 still tells the rows apart.
SPREAD = 0.1
# Rows that are drawn at once, so that no second table of the new size exists.
_BLOCK_ROWS = 16_384


@dataclass(frozen=True)
class CodeVocabulary:
    """Place of a tokenizer's codes in the vocabulary of a language model.

    Attributes:
        name: of what the codes are codes, part of the tokens' names: <|image_start|>, <|image_code_7|>.
        start, end: ids of the tokens that stand before and after the codes.
        offset: id of code 0. Code k has the id offset + k.
        codebook_size: K, number of codes.
    """

    name: str
    start: int
    end: int
    offset: int
    codebook_size: int

    @classmethod
    def from_tokenizer(
        cls, tokenizer: PreTrainedTokenizerBase, name: str = "image"
    ) -> "CodeVocabulary":
        """Find the tokens that add_code_tokens added, in a tokenizer that may have been saved and loaded since.

        Raises:
            ValueError: if they are not there, or not one after another, naming the first that is amiss.
        """
        vocabulary = tokenizer.get_vocab()
        start, end = (_find(vocabulary, token, name) for token in _boundaries(name))
        offset = _find(vocabulary, code_token(name, 0), name)
        pattern = re.compile(rf"<\|{re.escape(name)}_code_\d+\|>")
        present = sum(1 for token in vocabulary if pattern.fullmatch(token))
        for count in range(present):
            token = code_token(name, count)
            if vocabulary.get(token) != offset + count:
                raise ValueError(
                    f"{token} should have the id {offset + count:,}, the tokenizer gives it "
                    f"{vocabulary.get(token)}: ids of codes must follow one another"
                )
        return cls(name, start, end, offset, present)

    def to_ids(self, codes: Tensor) -> Tensor:
        """Codes to token ids.

        Args:
            codes: (B, ...) integers of any type in [0, K), such as image_codes (B, h, w) or audio_codes
                (B, 1, T); read row by row.

        Returns:
            (B, 1 + n + 1) int64: start, the n codes of a sample, end.

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
                codes stand outside, or their number does not fit the shape; naming row and position.
        """
        ids = integers("ids", ids)
        rows = ids if ids.ndim == 2 else ids[None]
        # Each start, with the end that must come before the next start of the row.
        starts, ends = (rows == self.start).nonzero(), (rows == self.end).nonzero()
        depth = (rows == self.start).long().cumsum(1) - (rows == self.end).long().cumsum(1)
        inside = (depth == 1) & (rows != self.start)
        is_code = self._is_code(rows)
        self._refuse(rows, depth < 0, f"{_boundaries(self.name)[1]} without a start before it")
        self._refuse(rows, depth > 1, "begins before the one before it has ended: truncated")
        self._refuse(
            rows, inside & ~is_code, f"is no code, but stands where the {self.name} has not ended"
        )
        self._refuse(rows, is_code & ~inside, "is a code outside of start and end")
        if len(starts) != len(ends):
            row = int((depth[:, -1] != 0).nonzero()[0])
            position = int(starts[starts[:, 0] == row][-1, 1])
            found = rows.shape[1] - position - 1
            raise ValueError(
                f"the {self.name} that starts in row {row} at position {position} is truncated: "
                f"{found:,} codes and no {_boundaries(self.name)[1]}"
            )
        lengths = ends[:, 1] - starts[:, 1] - 1
        codes = rows[is_code] - self.offset
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
        start, end = _boundaries(self.name)
        flat = (self.to_ids(codes)[:, 1:-1] - self.offset).tolist()
        return [start + "".join(code_token(self.name, k) for k in row) + end for row in flat]

    def _is_code(self, ids: Tensor) -> Tensor:
        return (ids >= self.offset) & (ids < self.offset + self.codebook_size)

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
        full = inside & (width - 1 - started >= (self.length or width + 1))
        codes = slice(v.offset, v.offset + v.codebook_size)
        allowed = (~inside)[:, None].expand_as(scores).clone()
        allowed[:, codes] = (inside & ~full)[:, None]
        allowed[:, v.end] = full if self.length else inside
        return scores.masked_fill(~allowed, -torch.inf)


def code_token(name: str, code: int) -> str:
    """The token of a code, <|image_code_7|>."""
    return f"<|{name}_code_{code}|>"


def _boundaries(name: str) -> tuple[str, str]:
    return f"<|{name}_start|>", f"<|{name}_end|>"


@torch.no_grad()
def add_code_tokens(
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    codebook_size: int,
    name: str = "image",
    pad_to_multiple_of: int | None = None,
    seed: int = 0,
) -> CodeVocabulary:
    """Give a language model K tokens for codes and two that stand before and after them; both change in place.

    The new rows of its embeddings, and of its head, are the mean of the old ones with a little of their spread.
    Rows that the model already has beyond the tokenizer's last token (embeddings padded to a multiple) are used
    first, and are set likewise; the table never shrinks.

    transformers' own resize_token_embeddings(mean_resizing=True) multiplies each new row by a D x D factor,
    one after another: 4 ms a row at D = 1,024 on a CPU core, so a quarter of an hour for 262,144 of them, where
    this takes seconds. Its noise, 3e-5 of the old spread, lies below bfloat16's rounding.

    What a model of V tokens says about text is untouched but for the share that codes take before training: at
    most about K / (V + K). CodeLogitsProcessor keeps codes out of text.

    Args:
        tokenizer: fast or in Python. A fast one gets the codes as special tokens, which
            decode(skip_special_tokens=True) leaves out; one in Python as ordinary tokens, because transformers
            would need hours for so many special ones.
        model: a causal language model, tied or not, not yet sharded. Its config gets the new vocab_size.
        codebook_size: K.
        name: lower-case letters, digits and underscores; another for each kind of codes in one model.
        pad_to_multiple_of: rows of the embeddings become a multiple of this; 64 suits tensor cores.
        seed: of the new rows.

    Raises:
        ValueError: if an argument is out of range, the tokenizer already has one of the tokens, reads them in
            another way, or has more tokens than the model has rows. The model is not changed then.
    """
    if codebook_size < 1:
        raise ValueError(f"codebook_size must be at least 1, got {codebook_size}")
    if not re.fullmatch(r"[a-z0-9_]*[a-z][a-z0-9_]*", name):
        raise ValueError(f"name must be lower-case letters, digits and underscores, got {name!r}")
    known = tokenizer.get_vocab()
    tokens = [*_boundaries(name), *(code_token(name, k) for k in range(codebook_size))]
    for token in tokens:
        if token in known:
            raise ValueError(
                f"the tokenizer already has {token} (id {known[token]:,}): choose another name, or find "
                f"the tokens of {name!r} by CodeVocabulary.from_tokenizer"
            )
    used, rows = max(known.values()) + 1, len(model.get_input_embeddings().weight)
    if used > rows:
        raise ValueError(f"the tokenizer has ids up to {used - 1:,}, the model only {rows:,} rows")
    # All in one call: each call rebuilds the tables that find added tokens in a text.
    special = tokenizer.is_fast
    tokenizer.add_tokens(
        [AddedToken(token, normalized=False, special=special) for token in tokens[:2]],
        special_tokens=True,
    )
    tokenizer.add_tokens(
        [AddedToken(token, normalized=False, special=special) for token in tokens[2:]],
        special_tokens=special,
    )
    vocabulary = CodeVocabulary.from_tokenizer(tokenizer, name)
    _check_reading(tokenizer, vocabulary)
    first = min(vocabulary.start, vocabulary.end, vocabulary.offset)
    if first < used:
        raise ValueError(
            f"the tokenizer's ids have gaps: its tokens go up to id {used - 1:,}, yet it gave new ones ids "
            f"from {first:,} on, which overlap with others"
        )
    needed = vocabulary.offset + codebook_size
    if needed > rows or pad_to_multiple_of is not None:
        model.resize_token_embeddings(max(needed, rows), pad_to_multiple_of, mean_resizing=False)
    generator = torch.Generator().manual_seed(seed)
    inputs, head = model.get_input_embeddings(), model.get_output_embeddings()
    _start_rows(inputs.weight, first, generator)
    if head is not None and head.weight is not inputs.weight:
        _start_rows(head.weight, first, generator)
    if getattr(head, "bias", None) is not None:
        head.bias[first:] = head.bias[:first].mean()
    return vocabulary


def _start_rows(table: nn.Parameter, first: int, generator: torch.Generator) -> None:
    """Set the rows from `first` on: mean of those before, plus differences of old rows from it, made small.

    The differences are weighted sums of old rows' own, drawn at random: that gives them the old rows'
    covariance without computing it, and no two are alike.
    """
    mean = table[:first].mean(0, dtype=torch.float32)
    for begin in range(first, len(table), _BLOCK_ROWS):
        count = min(_BLOCK_ROWS, len(table) - begin)
        rows = mean.repeat(count, 1)
        for _ in range(2):
            drawn = torch.randint(0, first, (count,), generator=generator).to(table.device)
            weights = torch.randn(count, 1, generator=generator) * SPREAD / 2**0.5
            rows += weights.to(table.device) * (table[drawn].float() - mean)
        table[begin : begin + count] = rows.to(table.dtype)


def _check_reading(tokenizer: PreTrainedTokenizerBase, vocabulary: CodeVocabulary) -> None:
    """Raise unless the tokenizer reads the tokens in a text as what they are."""
    codes = torch.tensor([[0, vocabulary.codebook_size // 2, vocabulary.codebook_size - 1]])
    (text,), expected = vocabulary.to_text(codes), vocabulary.to_ids(codes)[0].tolist()
    found = tokenizer(text, add_special_tokens=False)["input_ids"]
    if found != expected:
        raise ValueError(
            f"the tokenizer reads {text} as the ids {found} instead of {expected}: tokens that it had "
            "overlap with them; choose another name, and load the tokenizer anew"
        )


def _find(vocabulary: dict[str, int], token: str, name: str) -> int:
    if token not in vocabulary:
        raise ValueError(
            f"the tokenizer has no {token}: add_code_tokens(tokenizer, model, K, name={name!r}) adds it"
        )
    return vocabulary[token]
