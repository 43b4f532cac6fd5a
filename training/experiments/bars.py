"""Figures of what compares a few variants."""

from training.experiments.report import COLUMNS, by_variant, mean, new_figure

PANELS = ("train_utilisation", "perplexity", "psnr")


def draw_panels(names: list[str], panels: list[tuple[str, str, list[float | None]]]):
    """Draw horizontal bars, the first name on top.

    Args:
        panels: title, format of the numbers, and the number of each name, or None.
    """
    figure, axes = new_figure(len(panels), height=0.9 + 0.38 * len(names))
    for axis, (title, form, values) in zip(axes, panels, strict=True):
        labels = ["" if value is None else form.format(value) for value in values]
        bars = axis.barh(names, [value or 0.0 for value in values])
        axis.bar_label(bars, labels=labels, padding=3, fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.margins(x=0.22)
        axis.invert_yaxis()
        axis.tick_params(labelleft=axis is axes[0], labelsize=8)
    return figure


def draw_bars(runs: list[dict], metrics: tuple[str, ...] = PANELS):
    """Draw some metrics of every variant, means over seeds; the last one is of quality."""
    groups = by_variant(runs)
    values = [[mean(group, metric) for group in groups.values()] for metric in metrics]
    panels = [(*COLUMNS[metric], some) for metric, some in zip(metrics, values, strict=True)]
    figure = draw_panels(list(groups), panels)
    known = [value for value in values[-1] if value is not None]
    if known:  # quality has no zero worth showing
        spread = max(known) - min(known)
        room = 0.05 * abs(max(known))
        figure.axes[-1].set_xlim(min(known) - 0.6 * spread - room, max(known) + 0.4 * spread + room)
    return figure
