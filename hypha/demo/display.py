"""How the demo shows itself: a live picture in a terminal, plain lines anywhere else.

   41.2 s  round 7/10: training loss 2.310, 512 samples of 2 workers, 160 a second
━━━━━━━━━━━━━━━━━━━━━━━━━━━━╺━━━━━━━━━━━
round 7/10   held-out loss 2.226   160 samples/s   3 leases   0 errors   41 s
gateway   is where the others meet
worker-1  trains                                                        …
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hypha.demo.progress import Progress

REFRESHES_PER_S = 4
BAR_COLUMNS = 60


class Display:
    """Says sentences as they come, and in a terminal keeps the picture below them; made by `display`."""

    def __init__(self, console: Console, live: Live | None) -> None:
        self._console = console
        self._live = live
        self._began = time.monotonic()

    def say(self, sentence: str) -> None:
        """Print one line with the seconds since the beginning."""
        line = f"{time.monotonic() - self._began:6.1f} s  {sentence}"
        if self._live is None:
            self._console.file.write(line + "\n")
            self._console.file.flush()
        else:
            self._console.print(Text(line))

    def show(self, progress: Progress) -> None:
        """Bring the picture up to date; nothing where there is none."""
        if self._live is not None:
            self._live.update(picture(progress, time.monotonic() - self._began))


def picture(progress: Progress, seconds: float) -> RenderableType:
    """Return the bar with the newest numbers, and who does what."""
    bar = ProgressBar(total=max(1, progress.rounds_wanted), completed=progress.last_round, width=BAR_COLUMNS)
    loss = progress.latest_loss()
    numbers = [f"round {progress.last_round}/{progress.rounds_wanted or '?'}"]
    numbers.append("held-out loss ?" if loss is None else f"held-out loss {loss:.3f}")
    if progress.rounds:
        numbers.append(f"{progress.rounds[-1].samples_per_s:.0f} samples/s")
    numbers += [f"{len(progress.leases)} leases", f"{progress.errors} errors", f"{seconds:.0f} s"]
    cast = Table.grid(padding=(0, 2))
    for name, doing in progress.doing.items():
        cast.add_row(Text(name, style="bold"), Text(doing))
    line = Table.grid()
    line.add_row(bar)  # a bar by itself does not end its line
    return Group(line, Text("   ".join(numbers)), cast)


@contextmanager
def display(*, to_stderr: bool) -> Iterator[Display]:
    """Keep the display while the block runs: live if the stream is a terminal, else plain lines."""
    console = Console(stderr=to_stderr, highlight=False)
    if not console.is_terminal:
        yield Display(console, None)
        return
    with Live(console=console, refresh_per_second=REFRESHES_PER_S, transient=True) as live:
        yield Display(console, live)
