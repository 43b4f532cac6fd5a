"""Codes as tokens of an existing language model: its vocabulary grows, and codes become ids and back.

    vocabulary = add_code_tokens(tokenizer, model, codebook_size=65536)
    ids = vocabulary.to_ids(codes)              # (B, h, w) -> (B, 1 + h * w + 1), between begin and end tokens
    codes = vocabulary.to_codes(ids, (h, w))    # and back, whatever text stands around them

The tokens are ordinary tokens of the tokenizer, so they survive save_pretrained by themselves, and
CodeVocabulary.from_tokenizer finds them again without any other file.
"""

import operator
import re

import torch
from torch import nn
from transformers import AddedToken, PreTrainedModel, PreTrainedTokenizerBase

from .code_vocabulary import KINDS, CodeVocabulary, boundary_tokens

# New rows spread around the mean of the old ones with this share of the old rows' own spread. What the model
# says about text hardly changes (where logits of old tokens have a standard deviation s, those of new ones have
# s / 10), yet bfloat16 still tells the rows apart.
SPREAD = 0.1
# Rows that are drawn at once, so that no second table of the new size exists.
_BLOCK_ROWS = 16_384


@torch.no_grad()
def add_code_tokens(
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    codebook_size: int,
    name: str = "image",
    pad_to_multiple_of: int | None = None,
    seed: int = 0,
    factors: tuple[int, int] | None = None,
    num_quantizers: int = 1,
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
        factors: (K1, K2) with K1 * K2 = K: a code k takes two tokens, for k // K2 and for k % K2. (512, 512)
            adds 1,024 rows instead of 262,144; sequences become twice as long. SimVQ numbers its codes at
            random; number them by order_by_similarity (code_prediction.py), and codes that share their first
            token are similar.
        num_quantizers: Q, codes of a position, each with K tokens of its own. Does not go with factors.

    Raises:
        ValueError: if an argument is out of range, the tokenizer already has one of the tokens, reads them in
            another way, or has more tokens than the model has rows. The model is not changed then.
    """
    if codebook_size < 1:
        raise ValueError(f"codebook_size must be at least 1, got {codebook_size}")
    if not re.fullmatch(r"[a-z0-9_]*[a-z][a-z0-9_]*", name):
        raise ValueError(f"name must be lower-case letters, digits and underscores, got {name!r}")
    if factors is not None:
        factors = _checked_factors(factors, codebook_size)
    if num_quantizers < 1 or (num_quantizers > 1 and factors is not None):
        raise ValueError(
            f"num_quantizers must be at least 1, and 1 with factors, got {num_quantizers} and factors={factors}"
        )
    known = tokenizer.get_vocab()
    planned = CodeVocabulary(name, 0, 1, 2, codebook_size, factors, num_quantizers)
    tokens = [*boundary_tokens(name), *map(planned.token, range(planned.code_tokens))]
    for token in tokens:
        if token in known:
            raise ValueError(
                f"the tokenizer already has {token} (id {known[token]:,}): choose another name, or find "
                f"the tokens of {name!r} by CodeVocabulary.from_tokenizer"
            )
    for token in known:
        if re.fullmatch(rf"<\|{name}_({KINDS})_\d+\|>", token):
            raise ValueError(
                f"the tokenizer already has {token} (id {known[token]:,}): choose another name than {name!r}"
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
    needed = vocabulary.offset + vocabulary.code_tokens
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
    if vocabulary.num_quantizers > 1:
        codes = codes[:, None].expand(-1, vocabulary.num_quantizers, -1)
    (text,), expected = vocabulary.to_text(codes), vocabulary.to_ids(codes)[0].tolist()
    found = tokenizer(text, add_special_tokens=False)["input_ids"]
    if found != expected:
        raise ValueError(
            f"the tokenizer reads {text} as the ids {found} instead of {expected}: tokens that it had "
            "overlap with them; choose another name, and load the tokenizer anew"
        )


def _checked_factors(factors: tuple[int, int], codebook_size: int) -> tuple[int, int]:
    wrong = f"factors must be two numbers whose product is {codebook_size:,}, got {factors}"
    try:
        first, second = (operator.index(number) for number in factors)
    except (TypeError, ValueError):
        raise ValueError(wrong) from None
    if first < 1 or second < 1 or first * second != codebook_size:
        raise ValueError(wrong)
    return first, second
