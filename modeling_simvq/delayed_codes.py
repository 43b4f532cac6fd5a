"""Several codes at each position of a code model: the delay pattern (MusicGen, arXiv 2306.05284, section 2.2).

Level q of a position stands q steps later than level 0, so that a step predicts one code of every level and has
seen all earlier levels of each:

    step     0    1    2    3    4
    level 0  c00  c01  c02  -    -
    level 1  -    c10  c11  c12  -
    level 2  -    -    c20  c21  c22
"""

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

from .code_prediction import FactorizedCodes, make_codes
from .configuration_simvq_generation import SimVQGenerationConfig

NO_CODE = -1  # in the place of a code where a level has none at a step


def delay(codes: Tensor, mask: Tensor | None = None) -> Tensor:
    """Arrange codes by steps.

    Args:
        codes: (B, Q, T) integers.
        mask: (B, T) bool, false for padding, which becomes NO_CODE; None if there is none.

    Returns:
        (B, Q, T + Q - 1), NO_CODE where a level has not begun or is over.
    """
    batch, levels, length = codes.shape
    if mask is not None:
        codes = codes.masked_fill(~mask[:, None], NO_CODE)
    delayed = codes.new_full((batch, levels, length + levels - 1), NO_CODE)
    for level in range(levels):
        delayed[:, level, level : level + length] = codes[:, level]
    return delayed


def undelay(delayed: Tensor, starts: Tensor | None = None, length: int | None = None) -> Tensor:
    """Arrange codes by positions again.

    Args:
        delayed: (B, Q, steps, ...) as delay arranges them; what else stands there is left out.
        starts: (B,) step of each sample's first code; None if all begin at step 0.
        length: positions; None for all that steps has, `steps - (Q - 1)`.

    Returns:
        (B, Q, length, ...). Behind the last step of a level its last code is repeated.
    """
    batch, levels, steps, *rest = delayed.shape
    length = steps - levels + 1 if length is None else length
    place = torch.arange(length, device=delayed.device)
    place = place + torch.arange(levels, device=delayed.device)[:, None]
    place = place.expand(batch, -1, -1)
    if starts is not None:
        place = (place + starts[:, None, None]).clamp(max=steps - 1)
    index = place.reshape(*place.shape, *[1] * len(rest)).expand(-1, -1, -1, *rest)
    return delayed.gather(2, index)


class DelayedCodes(nn.Module):
    """Embedding and prediction of Q codes a step: PlainCodes or FactorizedCodes of each level.

    A step enters as the sum of its codes' vectors. A level that has no code there brings a vector of its own.
    """

    def __init__(self, config: SimVQGenerationConfig):
        super().__init__()
        # Behind the start tokens, which only the first level has, stands NO_CODE.
        starts = [config.num_start_tokens] + [0] * (config.num_quantizers - 1)
        self.levels = nn.ModuleList(make_codes(config, start_tokens=n + 1) for n in starts)
        self.no_code = [config.codebook_size + n for n in starts]

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (B, Q, n), of codes, start tokens and NO_CODE, to vectors (B, n, d)."""
        total = 0.0
        for level, codes, no_code in zip(self.levels, ids.unbind(1), self.no_code, strict=True):
            total = total + level(torch.where(codes == NO_CODE, no_code, codes))
        return total

    def loss(self, hidden: Tensor, codes: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mean cross-entropy of each level.

        Args:
            hidden: (B, T + Q - 1, d) after each step.
            codes: (B, Q, T), not delayed.
            mask: (B, T) bool, false for codes that do not count; None if all do.

        Returns:
            (Q,) float32, natural logarithm.
        """
        length, real = codes.shape[2], ...
        if mask is not None:
            real = mask.flatten().nonzero()[:, 0]  # waits once; each use of a mask would
        return torch.stack(
            [
                level.loss(
                    hidden[:, number : number + length].flatten(0, 1)[real],
                    codes[:, number].flatten()[real],
                )
                for number, level in enumerate(self.levels)
            ]
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (B, n, d) to logits (B, Q, n, K) of the next step's codes."""
        return torch.stack([level.logits(hidden) for level in self.levels], dim=1)

    def arrange(self, codebooks: list[Tensor]) -> None:
        """Make cells of similar codes in each level, see FactorizedCodes.arrange."""
        if len(codebooks) != len(self.levels):
            raise ValueError(
                f"arrange_codes takes {len(self.levels)} codebooks, one of each quantizer, "
                f"got {len(codebooks)}"
            )
        for level, codebook in zip(self.levels, codebooks, strict=True):
            if isinstance(level, FactorizedCodes):
                level.arrange(codebook)


def ids_of_rows(
    rows: Tensor, levels: int, columns: Tensor, spans: Tensor | None, length: int | None
) -> Tensor:
    """Turn the rows of ``generate``, Q for each sample, into the ids that DelayedCodes takes.

    ``generate`` samples a code of every level at every step. Those that are no codes of a position are left out
    here, by their column alone: the start token stands before the first code of level 0, that of level q is q
    columns later.

    Args:
        rows: (B * Q, n) token ids, level by level for each sample.
        levels: Q.
        columns: (n,), of each step in the whole sequences.
        spans: (B * Q, 2), columns of level 0's first code and behind its last; None where sequences begin with
            the start token and have `length` positions, or no end.

    Returns:
        (B, Q, n).
    """
    rows = rows.unflatten(0, (-1, levels))
    position = columns - torch.arange(levels, device=rows.device)[:, None]
    if spans is None:
        position = position - 1
    else:
        spans = spans[::levels, :, None, None]
        position, length = position - spans[:, 0], spans[:, 1] - spans[:, 0]
    there = position >= 0
    if length is not None:
        there &= position < length
    there[..., 0, :] |= position[..., 0, :] == -1  # the start token
    return rows.where(there, NO_CODE)


class KnownCodes(LogitsProcessor):
    """Codes of a prompt that stand behind its last whole step: ``generate`` has to take them as they are.

    Args:
        known: (B * Q, n) of the first n steps that are generated; NO_CODE where any code may come.
        begin: length of the sequences before these steps.
    """

    def __init__(self, known: Tensor, begin: int):
        self.known, self.begin = known, begin

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B * Q, K), those of other codes -inf where the next one is known."""
        step = input_ids.shape[1] - self.begin
        if step >= self.known.shape[1]:
            return scores
        known = self.known[:, step, None]
        only = torch.full_like(scores, -torch.inf).scatter(1, known.clamp(min=0), 0.0)
        return only.where(known != NO_CODE, scores)
