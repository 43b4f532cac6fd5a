"""The figure of experiments that compare a few variants."""

from training.experiments.report import COLUMNS, by_variant, mean, new_figure

PANELS = ("train_utilisation", "perplexity", "psnr")


def draw_bars(runs: list[dict]):
    """Horizontal bars of every variant's utilisation, perplexity and PSNR, means over seeds."""
    groups = by_variant(runs)
    figure, axes = new_figure(len(PANELS), height=0.9 + 0.38 * len(groups))
    names = list(groups)[::-1]
    for axis, metric in zip(axes, PANELS, strict=True):
        values = [mean(groups[name], metric) or 0.0 for name in names]
        labels = [COLUMNS[metric][1].format(value) for value in values]
        axis.bar_label(axis.barh(names, values), labels=labels, padding=3, fontsize=8)
        axis.set_title(COLUMNS[metric][0], fontsize=10)
        axis.margins(x=0.22)
        axis.tick_params(labelleft=axis is axes[0], labelsize=8)
    best = max(mean(group, "psnr") or 0.0 for group in groups.values())
    worst = min(mean(group, "psnr") or best for group in groups.values())
    # PSNR has no zero worth showing.
    axes[-1].set_xlim(worst - 0.6 * (best - worst) - 0.5, best + 0.4 * (best - worst) + 0.5)
    return figure
