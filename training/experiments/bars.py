"""The figure of experiments that compare a few variants."""

from training.experiments.report import COLUMNS, by_variant, mean, new_figure

PANELS = ("train_utilisation", "perplexity", "psnr")


def draw_bars(runs: list[dict], panels: tuple[str, ...] = PANELS):
    """Horizontal bars of some metrics of every variant, means over seeds; the last one is of quality."""
    groups = by_variant(runs)
    figure, axes = new_figure(len(panels), height=0.9 + 0.38 * len(groups))
    names = list(groups)[::-1]
    for axis, metric in zip(axes, panels, strict=True):
        values = [mean(groups[name], metric) for name in names]
        labels = ["" if value is None else COLUMNS[metric][1].format(value) for value in values]
        bars = axis.barh(names, [value or 0.0 for value in values])
        axis.bar_label(bars, labels=labels, padding=3, fontsize=8)
        axis.set_title(COLUMNS[metric][0], fontsize=10)
        axis.margins(x=0.22)
        axis.tick_params(labelleft=axis is axes[0], labelsize=8)
    known = [value for group in groups.values() if (value := mean(group, panels[-1])) is not None]
    if known:  # quality has no zero worth showing
        spread = max(known) - min(known)
        room = 0.05 * abs(max(known))
        axes[-1].set_xlim(min(known) - 0.6 * spread - room, max(known) + 0.4 * spread + room)
    return figure
