"""The plots of the benchmarks: how something grows, both axes logarithmic."""

from collections.abc import Mapping, Sequence
from pathlib import Path


def log_log(
    path: Path, sizes: Sequence[int], lines: Mapping[str, tuple[str, Sequence[float]]], *, title: str, x: str, y: str
) -> None:
    """Draw each line, by label its style and its values at `sizes`, and write the picture to `path`."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for label, (style, values) in lines.items():
        axes.plot(sizes, values, style, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title)
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
