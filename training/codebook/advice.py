"""Advice on a collapsing codebook: why few codes are used, and which setting to change."""

from dataclasses import dataclass

from training.codebook.usage import CodeUsage

# Reports in a row that have to agree before anything is said: the first ones after the warm-up differ widely.
PATIENCE = 3

# What helped most in practice comes first.
_FIRST = "train first without quantization, so that the codes start where the latents are (autoencoder_steps)"
ADVICE = {
    "outgrown": (
        "the latents are much larger than the codes, so a few outer codes take them all: "
        f"{_FIRST}, raise commitment_weight or commitment_cost, or lower learning_rate"
    ),
    "shrunk": (
        "the latents are much smaller than the codes, so a few inner codes take them all: "
        f"{_FIRST}, or lower commitment_weight"
    ),
    "narrow": (
        f"the latents span few dimensions: set whiten_latents=true, {_FIRST}, or choose a smaller codebook_dim"
    ),
    "unclear": (
        f"scale and rank look sound, so it may only be early: if it stays, {_FIRST}, draw the codes from "
        "the latents (codes_from_latents=true), add warmup_steps or lower learning_rate"
    ),
}


@dataclass
class CodebookFigures:
    """Figures behind a diagnosis: see CodeUsage and latent_statistics, and the width of a code."""

    usage: CodeUsage
    scale_ratio: float
    rank: float
    codebook_dim: int

    def __str__(self) -> str:
        usage = self.usage
        return (
            f"only {usage.utilisation:.2%} of the codes are used ({usage.tokens:,} tokens could reach "
            f"{usage.reachable:.1%} of {usage.codebook_size:,}; perplexity {usage.perplexity:.1f}, scale ratio "
            f"{self.scale_ratio:.2g}, effective rank {self.rank:.1f} of {self.codebook_dim})"
        )


def cause_of_collapse(figures: CodebookFigures, before: str | None = None) -> str | None:
    """A key of ADVICE; None while all is well.

    The alarm is at a tenth of what the number of tokens allows. Causes in the order in which users met
    them: latents that outgrew the codes, latents that shrank, latents that span few dimensions.

    Args:
        before: what was found a moment ago. It holds until the figures are clear of its threshold.
    """
    usage, ratio = figures.usage, figures.scale_ratio
    if usage.utilisation >= (0.1 if before is None else 0.2) * usage.ceiling:
        return None
    if ratio > (2 if before == "outgrown" else 3):
        return "outgrown"
    if ratio < (1 / 2 if before == "shrunk" else 1 / 3):
        return "shrunk"
    if figures.rank < (0.15 if before == "narrow" else 0.1) * figures.codebook_dim:
        return "narrow"
    return "unclear"


def diagnose_collapse(
    usage: CodeUsage, scale_ratio: float, rank: float, codebook_dim: int
) -> str | None:
    """One sentence on why few codes are used and which setting to change; None while all is well."""
    figures = CodebookFigures(usage, scale_ratio, rank, codebook_dim)
    cause = cause_of_collapse(figures)
    return None if cause is None else f"{figures}: {ADVICE[cause]}"


class CollapseAdviser:
    """Says once what is wrong with a codebook, and again only when that has changed for good."""

    def __init__(self):
        self.said: str | None = None  # the cause that was last spoken of; None: all well
        self.found: str | None = None  # that of the last report
        self.reports = 0  # in a row that found it

    def advise(self, figures: CodebookFigures) -> str | None:
        """Take in a report; a sentence where there is something new to say."""
        cause = cause_of_collapse(figures, self.found)
        self.reports = self.reports + 1 if cause == self.found else 1
        self.found = cause
        if cause == self.said or self.reports < PATIENCE:
            return None
        self.said = cause
        if cause is None:
            return f"the codebook has recovered: {figures.usage}"
        return f"{figures}: {ADVICE[cause]}"

    def rest(self) -> None:
        """A report that tells nothing, as during a warm-up."""
        self.found, self.reports = None, 0

    def state_dict(self) -> dict:
        return dict(vars(self))

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)
