"""Results of a codebook analysis as figures (matplotlib), JSON and a page."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from training.codebook.advice import diagnose_collapse
from training.codebook.predictability import Predictability
from training.codebook.spectra import Spectrum
from training.codebook.usage import CodeUsage

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter, PercentFormatter

# Key: what it is, its short name in a figure, its colour there.
DISTANCES = {
    "latent_to_code": ("latent to its code", "to the code", "C0"),
    "latent_to_mean": ("latent to the mean of the latents", "to the mean", "C1"),
    "code_to_code": ("code to the nearest other code", "all codes", "C0"),
    "used_to_code": ("used code to the nearest other code", "used codes", "C0"),
    "dead_to_code": ("dead code to the nearest other code", "dead codes", "C3"),
    "used_to_latent": ("used code to the nearest latent", "used codes", "C0"),
    "dead_to_latent": ("dead code to the nearest latent", "dead codes", "C3"),
}
DISTANCE_PANELS = {
    "latents": ("latent_to_code", "latent_to_mean"),
    "codes to the nearest other code": ("code_to_code", "used_to_code", "dead_to_code"),
    "codes to the nearest latent": ("used_to_latent", "dead_to_latent"),
}
MATRIX_COLORS = {"W": "C3", "C": "C7", "codebook": "C0", "latents": "C1"}
RANKS_NOTE = (
    "Effective rank: exp of the entropy of the singular values. Numerical rank: those that are not zero up to "
    "float32's rounding. The codebook is W C + b; it, C and the latents are taken about their means."
)


@dataclass
class CodebookFindings:
    """Findings about one model's codebook.

    Attributes:
        name: what to call the model.
        spectra: "W" and "C" where the quantizer has them, "codebook", and "latents" if there were data.
        distances: key of DISTANCES to Euclidean distances (n,), in the unit of the latents.
        counts: (K,) int64, tokens of every code, descending. None without data, like the next.
        scale_ratio: of latent_statistics; None too where latents and codes are no vectors of one space.
        history: figures of the run's validations, in the order of steps.
        predictability: of the codes; None without at least two samples.
    """

    name: str
    quantizer: str
    codebook_size: int
    codebook_dim: int
    spectra: dict[str, Spectrum]
    distances: dict[str, Tensor] = field(default_factory=dict)
    counts: Tensor | None = None
    scale_ratio: float | None = None
    history: list[dict[str, float]] = field(default_factory=list)
    predictability: Predictability | None = None

    def usage(self) -> dict[str, float]:
        """Figures of the codes' use by the data.

        Those of CodeUsage; dead_codes: codes that no token has; utilisation_by_chance: see
        reachable_utilisation; scale_ratio, and lost_variance: mean square of latent minus code, over that of
        latent minus mean; and those of Predictability.
        """
        usage, dead = CodeUsage.from_counts(self.counts), int((self.counts == 0).sum())
        figures = vars(usage) | {"dead_codes": dead, "utilisation_by_chance": usage.reachable}
        if self.scale_ratio is not None:
            error, spread = (
                float(self.distances[key].square().mean())
                for key in ("latent_to_code", "latent_to_mean")
            )
            lost = error / spread if spread else math.nan
            figures |= {"scale_ratio": self.scale_ratio, "lost_variance": lost}
        return figures | (self.predictability.metrics() if self.predictability else {})

    def verdict(self) -> str:
        """Judge the findings in a few sentences."""
        ranks = {name: spectrum.effective_rank for name, spectrum in self.spectra.items()}
        span = f"The codes span about {ranks['codebook']:.1f} of {self.codebook_dim} dimensions"
        if "latents" in ranks:
            span += f", the latents {ranks['latents']:.1f}"
        parts = ["No data were given: which codes are used is not known", span]
        if self.counts is not None:
            parts[0] = self._usage_verdict(ranks["latents"])
            if self.scale_ratio is not None:
                lost = self.usage()["lost_variance"]
                parts.append(f"Quantization loses {lost:.1%} of the latents' variance")
        if "W" in ranks and self.spectra["W"].numerical_rank < min(self.spectra["W"].shape):
            parts.append(f"W is singular: its numerical rank is {self.spectra['W'].numerical_rank}")
        return ". ".join(parts) + "."

    def _usage_verdict(self, rank: float) -> str:
        usage, ratio = CodeUsage.from_counts(self.counts), self.scale_ratio or 1.0
        if collapse := diagnose_collapse(usage, ratio, rank, self.codebook_dim):
            return f"**Collapsed**: {collapse}"
        if usage.utilisation >= 0.9:
            return f"**Well used**: {usage}, perplexity {usage.perplexity:,.0f}"
        if usage.tokens < 10 * self.codebook_size:
            return (
                f"**Not collapsed**: {usage}. So few tokens cannot tell rare codes from dead ones"
            )
        return f"**Partly used**: {usage}, {self.usage()['dead_codes']:,} are dead"

    def content(self) -> dict:
        """All figures, for JSON."""
        spectra = {
            name: {
                "shape": list(spectrum.shape),
                "effective_rank": spectrum.effective_rank,
                "numerical_rank": spectrum.numerical_rank,
                "dimensions_of_90_percent": spectrum.variance_rank,
                "singular_values": [float(f"{value:.6g}") for value in spectrum.values],
            }
            for name, spectrum in self.spectra.items()
        }
        names = ("percentile_5", "median", "percentile_95")
        distances = {
            key: dict(zip(names, quantiles(values), strict=True))
            for key, values in self.distances.items()
        }
        return {
            "name": self.name,
            "quantizer": self.quantizer,
            "codebook_size": self.codebook_size,
            "codebook_dim": self.codebook_dim,
            "verdict": self.verdict().replace("**", ""),
            "usage": None if self.counts is None else self.usage(),
            "spectra": spectra,
            "distances": distances,
            "history": self.history,
        }


def quantiles(values: Tensor) -> list[float]:
    """5th percentile, median and 95th percentile of values (n,)."""
    return values.quantile(values.new_tensor([0.05, 0.5, 0.95])).tolist()


def _panels(rows: int, columns: int, width: float = 4.6, height: float = 3.5):
    size = (width * columns, height * rows)
    return plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)


def draw_usage(models: list[CodebookFindings]):
    """Codes sorted by frequency, both axes logarithmic, against uniform use."""
    figure, ((axis,),) = _panels(1, 1, width=6.4, height=4.2)
    for color, model in enumerate(models):
        used = model.counts[model.counts > 0]
        size, mean = model.codebook_size, int(model.counts.sum()) / model.codebook_size
        label = f"{model.name}: {CodeUsage.from_counts(model.counts)}"
        axis.step(range(1, len(used) + 1), used, where="post", color=f"C{color}", label=label)
        axis.plot([1, size], [mean, mean], "--", color=f"C{color}", linewidth=1)
        # Few tokens fall unevenly on equally likely codes: so many codes get c or more (Poisson).
        counts = torch.arange(1, int(mean + 8 * mean**0.5) + 9, dtype=torch.float64)
        codes = size * torch.special.gammainc(counts, torch.full_like(counts, mean))
        axis.plot(codes[codes >= 1], counts[codes >= 1], ":", color=f"C{color}", linewidth=1)
    axis.plot([], [], "--", color="0.4", linewidth=1, label="uniform")
    axis.plot([], [], ":", color="0.4", linewidth=1, label="as many tokens drawn uniformly")
    axis.set(xscale="log", yscale="log", xlabel="code, by frequency", ylabel="tokens")
    _finish(axis, "use of the codes")
    return figure


def draw_spectra(models: list[CodebookFindings]):
    """Normalised singular spectra up to the numerical rank, a panel a model."""
    columns = min(3, len(models))
    figure, panels = _panels(-(-len(models) // columns), columns, 5.2)
    for axis, model in zip(panels.flat, models, strict=False):
        for name, spectrum in model.spectra.items():
            real = spectrum.values[: spectrum.numerical_rank]
            label = f"{name}: effective rank {spectrum.effective_rank:.1f}"
            style = {"linestyle": "--" if name == "latents" else "-", "color": MATRIX_COLORS[name]}
            axis.plot(range(1, len(real) + 1), real, marker=".", markersize=4, label=label, **style)
        axis.set(yscale="log", xlabel="number", ylabel="singular value over the largest")
        _finish(axis, model.name)
    for axis in panels.flat[len(models) :]:
        axis.set_visible(False)
    return figure


def draw_distances(models: list[CodebookFindings]):
    """Histograms of distances, a row a model; None if there are none."""
    known = {key for model in models for key in model.distances}
    panels = {title: keys for title, keys in DISTANCE_PANELS.items() if known & set(keys)}
    if not panels:
        return None
    figure, rows = _panels(len(models), len(panels), height=3.1)
    for axes, model in zip(rows, models, strict=True):
        for axis, (title, keys) in zip(axes, panels.items(), strict=True):
            shown = {key: model.distances[key] for key in keys if key in model.distances}
            positive = torch.cat([torch.ones(0), *(v[v > 0] for v in shown.values())])
            # Distances of codes differ by orders of magnitude, so bins are equal steps of the logarithm.
            # Of codes that coincide it would be minus infinity: they count in the lowest bin.
            low, high = positive.aminmax() if len(positive) else (torch.tensor(1.0),) * 2
            bins = torch.logspace(low.log10() - 0.02, high.log10() + 0.02, 61)
            for key, values in shown.items():
                axis.hist(
                    values.clamp(min=float(low)),
                    bins=bins,
                    weights=torch.full_like(values, 1 / len(values)),
                    color=DISTANCES[key][2],
                    alpha=0.55,
                    label=DISTANCES[key][1],
                )
            axis.set(xscale="log", xlabel="distance")
            axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.xaxis.set_major_formatter(FormatStrFormatter("%g"))
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            _finish(axis, title if len(models) == 1 else f"{model.name}: {title}")
    return figure


def draw_training(models: list[CodebookFindings]):
    """Ranks, utilisation and perplexity at every validation of the runs; None if there are none."""
    panels = {
        "effective rank": {"rank_w": "W", "rank_codebook": "codebook"},
        "codes used by the validation data": {
            "utilisation": "",
            "reachable_utilisation": "could be reached",
        },
        "perplexity": {"perplexity": ""},
    }
    known = {key for model in models for figures in model.history for key in figures}
    panels = {title: keys for title, keys in panels.items() if known & set(keys)}
    if not panels:
        return None
    figure, (axes,) = _panels(1, len(panels))
    for axis, (title, keys) in zip(axes, panels.items(), strict=True):
        for color, model in enumerate(models):
            for key, noun in keys.items():
                points = [(f["step"], f[key]) for f in model.history if key in f]
                style = "--" if key in ("rank_codebook", "reachable_utilisation") else "-"
                label = f"{model.name} {noun}" if len(models) > 1 else noun or model.name
                if points:
                    x, y = zip(*points, strict=True)
                    axis.plot(x, y, style, marker=".", color=f"C{color}", label=label)
        axis.set(xlabel="step", ylim=(0, None))
        if title.startswith("codes"):
            axis.yaxis.set_major_formatter(PercentFormatter(1.0))
        _finish(axis, title)
    return figure


def draw_spectra_over_training(models: list[CodebookFindings]):
    """Spectrum of W, or of the codebook where there is no W, from dark to light over the run; None without."""
    shown = []
    for model in models:
        for key, name in (("spectrum_w", "W"), ("spectrum_codebook", "codebook")):
            lines = [(figures["step"], figures[key]) for figures in model.history if key in figures]
            if lines:
                shown.append((model, name, lines))
                break
    if not shown:
        return None
    figure, (axes,) = _panels(1, len(shown), 5.2)
    for axis, (model, name, lines) in zip(axes, shown, strict=True):
        for number, (step, values) in enumerate(lines):
            color = plt.cm.viridis(number / max(1, len(lines) - 1))
            label = f"step {step:,}" if number in (0, len(lines) - 1) else None
            axis.plot(range(1, len(values) + 1), values, color=color, label=label)
        axis.set(yscale="log", xlabel="number", ylabel="singular value over the largest")
        _finish(axis, f"{model.name}: {name}")
    return figure


def _finish(axis, title: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8)


def write_results(folder: Path, models: list[CodebookFindings], source: str | None) -> str:
    """Write codebook.json, codebook.md and the figures; return the page.

    Args:
        source: the dataset and its split; None without data.
    """
    folder.mkdir(parents=True, exist_ok=True)
    again = (
        folder / "codebook.json"
    ).is_file()  # then the figures there are of an earlier analysis
    content = {"data": source, "models": [model.content() for model in models]}
    (folder / "codebook.json").write_text(json.dumps(content, indent=1) + "\n")
    drawn = {"spectra": draw_spectra(models), "distances": draw_distances(models)}
    drawn |= {"usage": draw_usage(models) if source else None, "training": draw_training(models)}
    drawn["training_spectra"] = draw_spectra_over_training(models)
    for name, figure in drawn.items():
        if again:
            (folder / f"{name}.png").unlink(missing_ok=True)
        if figure is not None:
            figure.savefig(folder / f"{name}.png", dpi=110)
            plt.close(figure)
    title = f"Codebook of {models[0].name}" if len(models) == 1 else "Codebooks compared"
    page = [f"# {title}", ""]
    for model in models:
        kind = (
            f"{model.quantizer}, {model.codebook_size:,} codes of {model.codebook_dim} dimensions"
        )
        page += [f"{model.name} ({kind}). {model.verdict()}", ""]
    sections = {
        "usage": ("Use of the codes", _usage_table(models) if source else [], f"Data: {source}."),
        "spectra": ("Dimensions", _rank_table(models), RANKS_NOTE),
        "distances": ("Distances", _distance_table(models), "Of tokens and codes drawn at random."),
        "training": ("Over training", [], "Figures of the run's validations."),
        "training_spectra": (
            "Spectra over training",
            [],
            "At every validation, from dark to light.",
        ),
    }
    for name, (heading, table, note) in sections.items():
        if drawn[name] is not None:
            page += [
                f"## {heading}",
                "",
                *table,
                *([""] if table else []),
                note,
                "",
                f"![]({name}.png)",
                "",
            ]
    text = "\n".join(page)
    (folder / "codebook.md").write_text(text)
    return text


def _table(*rows: list[str]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])]


def _usage_table(models: list[CodebookFindings]) -> list[str]:
    lines = {
        "tokens": ("tokens", "{:,}"),
        "codes used": ("utilisation", "{:.2%}"),
        "the most that so many tokens could use": ("ceiling", "{:.2%}"),
        "could be reached by so many tokens (equally likely codes)": (
            "utilisation_by_chance",
            "{:.2%}",
        ),
        "dead codes": ("dead_codes", "{:,}"),
        "perplexity": ("perplexity", "{:,.1f}"),
        "spread of the latents over that of the codes": ("scale_ratio", "{:.3g}"),
        "variance of the latents lost": ("lost_variance", "{:.1%}"),
        "bits a code at most (log2 K)": ("uniform_bits", "{:.2f}"),
        "bits a held-out code, by its frequency": ("frequency_bits", "{:.2f}"),
        "bits a held-out code, by its frequency and neighbours": ("neighbour_bits", "{:.2f}"),
        "held-out codes that no other sample has": ("unseen", "{:.2%}"),
    }
    usages = [model.usage() for model in models]
    rows = [
        [name, *(pattern.format(u[key]) if key in u else "" for u in usages)]
        for name, (key, pattern) in lines.items()
    ]
    return _table(["", *(model.name for model in models)], *rows)


def _rank_table(models: list[CodebookFindings]) -> list[str]:
    rows = [
        [
            model.name,
            name,
            "{:,} x {:,}".format(*spectrum.shape),
            f"{spectrum.effective_rank:.1f}",
            str(spectrum.numerical_rank),
            str(spectrum.variance_rank),
        ]
        for model in models
        for name, spectrum in model.spectra.items()
    ]
    heading = ["model", "matrix", "size", "effective rank", "numerical rank", "90 % of variance in"]
    return _table(heading, *rows)


def _distance_table(models: list[CodebookFindings]) -> list[str]:
    rows = [
        [model.name, DISTANCES[key][0], *(f"{value:.3g}" for value in quantiles(values))]
        for model in models
        for key, values in model.distances.items()
    ]
    return _table(["model", "distance", "5 %", "median", "95 %"], *rows)
