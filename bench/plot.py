"""Drawing a result's plot; the only file that knows matplotlib, which is an optional extra."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from bench.errors import ToolMissing
from bench.report import Plot

__all__ = ["draw"]


_UPRIGHT: Final[dict[str, Any]] = {"rotation": 90, "fontsize": 6, "va": "top", "ha": "right"}


def draw(plot: Plot, path: Path) -> None:
    """Draw a plot into a file whose suffix names the format.

    Raises:
        ToolMissing: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ToolMissing("--plot needs matplotlib: pip install 'shardserve[bench]'") from error
    # A bare Figure, not pyplot: no display, no state shared with whoever imported us.
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for series in plot.series:
        axes.plot(series.x, series.y, label=series.label)
    for x, name in plot.uprights:
        axes.axvline(x, color="grey", linewidth=0.8, linestyle=":")
        axes.text(x, 0.98, f" {name}", **_UPRIGHT, transform=axes.get_xaxis_transform())
    axes.set(
        title=plot.title,
        xlabel=plot.x_label,
        ylabel=plot.y_label,
        xscale="log" if plot.log_x else "linear",
        yscale="log" if plot.log_y else "linear",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
