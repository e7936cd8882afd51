"""The loss plot: `python -m hypha.demo.plot report.json loss.png`.

A process of its own, because matplotlib is large and slow to load and only the end of a demo needs it.
"""

import sys
from pathlib import Path
from typing import Any

import msgspec

INCHES = (7.0, 4.0)
DOTS_PER_INCH = 120


def draw(report: dict[str, Any], out: Path) -> None:
    """Write a PNG of training and held-out loss over the outer rounds of a report."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=INCHES, layout="constrained")
    rounds = report["training"]
    axes.plot(
        [each["number"] for each in rounds], [each["loss"] for each in rounds], label="training, mean of the round"
    )
    held_out = sorted((int(number), loss) for number, loss in report["held_out"].items())
    axes.plot([number for number, _ in held_out], [loss for _, loss in held_out], marker="o", label="held out")
    axes.set_xlabel("outer rounds")
    axes.set_ylabel("nats per byte")
    axes.set_title(f"{report['workers']} workers, {report['samples']} samples, {report['text']}")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    figure.savefig(out, dpi=DOTS_PER_INCH)


def main(arguments: list[str]) -> None:
    """Draw what the first argument reports into the second."""
    source, out = map(Path, arguments)
    draw(msgspec.json.decode(source.read_bytes()), out)


if __name__ == "__main__":
    main(sys.argv[1:])
