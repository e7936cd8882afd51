"""`hypha demo`: a whole secured network on this machine trains a small model on real text, with public commands only.

    main ─▶ Performance ─▶ Processes ─▶ hypha-certutil, hypha-data, hypha-gateway, hypha-worker, hypha-scheduler …
                │ reads DIR/logs ─▶ Progress ─▶ Display (terminal or plain lines)
                └▶ DIR/report.json, report.md, loss.png, model/            DIR/commands.sh: the same by hand

Exit codes: 0 done · 1 it failed · 2 usage · 130, 143 ended by SIGINT, SIGTERM. No process outlives it.
"""

import signal
import sys
from pathlib import Path

import msgspec
import trio

from hypha.demo import corpus
from hypha.demo.display import Display, display
from hypha.demo.nodes import Cast, free_port
from hypha.demo.performance import Performance
from hypha.demo.report import Report, lines
from hypha.errors import ConfigError

DEFAULT_DIRECTORY = "demo-run"
DIRECTORIES_TRIED = 1000
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
EXIT_SIGNAL_BASE = 128


def main(*, text: list[Path], workers: int, rounds: int, directory: Path | None, otlp: str | None, json: bool) -> int:
    """Run the demo and return its exit code; `workers` counts the one that serves parameters.

    Raises ConfigError (text, directory, port) and StoreError (DIR cannot be written).
    """
    cast = Cast(workers=workers, rounds=rounds, port=free_port(), otlp=otlp)
    learnt = corpus.given(text) if text else corpus.standard_library()
    where = _directory(directory)
    with display(to_stderr=json) as shown:
        shown.say(f"everything goes to {where}")
        performance = Performance(where, cast, learnt, shown)
        number = trio.run(_until_done_or_signalled, performance)
        report = performance.report()
        _conclude(report, where, shown, number=number, json=json)
    if number is not None:
        return EXIT_SIGNAL_BASE + number
    return 0 if report.failure is None else 1


async def _until_done_or_signalled(performance: Performance) -> int | None:
    """Return the signal that ended the run; a second one does not disturb the clearing up."""
    got: list[int] = []
    with trio.open_signal_receiver(*SIGNALS) as signals:
        async with trio.open_nursery() as watch:
            work = trio.CancelScope()

            async def cancel_on_signal() -> None:
                async for number in signals:
                    got.append(number)
                    work.cancel()

            watch.start_soon(cancel_on_signal)
            with work:
                await performance.run()
            watch.cancel_scope.cancel()
    return got[0] if got and work.cancelled_caught else None


def _conclude(report: Report, where: Path, shown: Display, *, number: int | None, json: bool) -> None:
    if number is not None:
        shown.say(f"ended by {signal.Signals(number).name}; nothing is left running, logs are in {where / 'logs'}")
    else:
        for line in lines(report):
            shown.say(line)
    if json:
        sys.stdout.buffer.write(msgspec.json.encode(report.summary(where)) + b"\n")
        sys.stdout.flush()
    elif number is None:
        shown.say(f"report: {report.summary(where).report}")


def _directory(wanted: Path | None) -> Path:
    """Return the absolute directory: the one wanted if it is new or empty, else the next free demo-run here."""
    if wanted is not None:
        if wanted.exists() and (not wanted.is_dir() or any(wanted.iterdir())):
            raise ConfigError(f"--dir: {wanted} exists and is not an empty directory")
        return wanted.resolve()
    for number in range(1, DIRECTORIES_TRIED):
        path = Path(DEFAULT_DIRECTORY if number == 1 else f"{DEFAULT_DIRECTORY}-{number}")
        if not path.exists():
            return path.resolve()
    raise ConfigError(f"there are {DIRECTORIES_TRIED} runs in {Path.cwd()}; give a directory with --dir")
