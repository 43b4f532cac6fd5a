"""Points of systems at rates, as a table and as a figure."""

import math
from dataclasses import dataclass

import numpy as np

from hub_cards.evaluation import METRICS, format_value, metric_name
from training.experiments.report import new_figure


@dataclass
class Point:
    """One system at one rate.

    Attributes:
        system: its name; points of one are a curve.
        setting: what tells the points of a system apart.
        is_file: whether it is a file format.
        rate: bits per pixel or kbit/s; None without a discrete code.
        header: the share of `rate` that a file of nothing takes too.
        metrics: by keys of hub_cards.evaluation.METRICS.
        samples: how many were measured.
    """

    system: str
    setting: str
    is_file: bool
    rate: float | None
    metrics: dict[str, float]
    header: float = 0.0
    samples: int = 0


def at_rate(curve: list[Point], rate: float) -> Point:
    """Return what a file format gives at a rate, between its qualities, or its smallest or largest file.

    Between two qualities metrics are interpolated over the logarithm of the rate.

    Args:
        curve: points of one format.
        rate: bits per pixel or kbit/s.
    """
    curve = sorted(curve, key=lambda point: point.rate)
    if rate < curve[0].rate:
        smallest = curve[0]
        return Point(
            f"{smallest.system}: no smaller file", smallest.setting, True, *_found(smallest)
        )
    if rate > curve[-1].rate:
        largest = curve[-1]
        return Point(f"{largest.system}: no larger file", largest.setting, True, *_found(largest))
    rates = [math.log(point.rate) for point in curve]
    metrics = {
        key: float(np.interp(math.log(rate), rates, [point.metrics[key] for point in curve]))
        for key in curve[0].metrics
    }
    return Point(f"{curve[0].system} at as many bits", "interpolated", True, rate, metrics)


def _found(point: Point) -> tuple[float, dict[str, float]]:
    return point.rate, point.metrics


def rows_of(points: list[Point], rate: str, shown: list[str]) -> list[str]:
    """Return a Markdown table: every tokenizer, and below it each file format at as many bits."""
    headings = ["system", "", METRICS[rate][0], *map(metric_name, shown)]
    rows = [f"| {' | '.join(headings)} |", "|" + "---|" * len(headings)]
    curves = by_system([point for point in points if point.is_file])
    for point in points:
        if point.is_file:
            continue
        rows.append(_row(point, rate, shown, bold=True))
        if point.rate is not None:
            rows += [_row(at_rate(curve, point.rate), rate, shown) for curve in curves.values()]
    return rows


def _row(point: Point, rate: str, shown: list[str], bold: bool = False) -> str:
    cells = [format_value(key, point.metrics[key]) if key in point.metrics else "" for key in shown]
    spent = "no discrete code" if point.rate is None else format_value(rate, point.rate)
    name = f"**{point.system}**" if bold else point.system
    return f"| {' | '.join([name, point.setting, spent, *cells])} |"


def by_system(points: list[Point]) -> dict[str, list[Point]]:
    """Points of each system, in order."""
    found: dict[str, list[Point]] = {}
    for point in points:
        found.setdefault(point.system, []).append(point)
    return found


def draw(points: list[Point], rate: str, shown: list[str]):
    """Draw each metric over the rate: a line for each system, a single point where it has one rate."""
    figure, axes = new_figure(len(shown), height=3.6)
    for axis, key in zip(np.atleast_1d(axes), shown, strict=True):
        for system, curve in by_system([p for p in points if p.rate is not None]).items():
            curve = sorted((p for p in curve if key in p.metrics), key=lambda point: point.rate)
            values, rates = [p.metrics[key] for p in curve], [p.rate for p in curve]
            style = {"marker": ".", "linewidth": 1} if curve[0].is_file else {"marker": "D"}
            (line,) = axis.plot(rates, values, label=system, markersize=6, **style)
            if any(point.header for point in curve):
                bare = [point.rate - point.header for point in curve]
                axis.plot(bare, values, linestyle=":", linewidth=1, color=line.get_color())
        axis.set_xscale("log")
        axis.set_title(metric_name(key), fontsize=10)
        axis.set_xlabel(METRICS[rate][0], fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3, which="both")
    np.atleast_1d(axes)[0].legend(fontsize=7)
    return figure
