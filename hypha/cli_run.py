"""The life of a role's process: signals, telemetry, trio, exit code.

    import, load ──▶ telemetry ──▶ trio.run(role) ──▶ telemetry's last batch ──▶ exit
         │                              │                     │
    SIGINT/SIGTERM: exit 0     cancel the role, exit 0     exit 0

The command line takes the signals over before the slow imports begin and until the process is gone
(`cli_role.leaving_quietly`), so that at no moment one of them ends in a traceback. A role's ConfigError is left to the
command line; any other HyphaError is one error line.
"""

import signal
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from typing import Any

import trio

from hypha import telemetry
from hypha.cli_app import EXIT_FAILED
from hypha.config import NodeConfig
from hypha.errors import ConfigError, HyphaError, JobFailed
from hypha.pki import load_identity
from hypha.runtime import boot_time
from hypha.telemetry import metrics

SIGNALS = (signal.SIGINT, signal.SIGTERM)
Run = Callable[..., Coroutine[Any, Any, None]]

_log = telemetry.get_logger("cli")


def run_role(program: str, run: Run, config: NodeConfig, *, polite: bool = False) -> None:
    """Run a role until it returns or a signal comes; a `polite` one is asked to leave first.

    Raises ConfigError; any other failure of the role is logged as an error and ends in SystemExit(1).
    """
    identity = load_identity(config)
    running = telemetry.start(program, config, instance=identity.peer_id)
    started = boot_time()
    try:
        for warning in identity.warnings:
            _log.warn(warning)
        _run_until_stopped(run, config, started, polite=polite)
    finally:
        running.shutdown()


def _run_until_stopped(run: Run, config: NodeConfig, started: float, *, polite: bool) -> None:
    faults: list[HyphaError] = []
    try:
        trio.run(partial(supervise, run, config, polite=polite))
    except* HyphaError as group:
        faults = list(_leaves(group))
    for fault in faults:
        if isinstance(fault, ConfigError):
            raise fault
    for fault in faults:
        message = "Job failed" if isinstance(fault, JobFailed) else "The node failed"
        _log.error(message, error=type(fault).__name__, reason=str(fault))
    _log.info(
        "Stopped",
        bytes_sent=int(metrics.NETWORK_BYTES_SENT.total()),
        bytes_received=int(metrics.NETWORK_BYTES_RECEIVED.total()),
        uptime_s=round(boot_time() - started, 3),
    )
    if faults:
        raise SystemExit(EXIT_FAILED)


async def supervise(run: Run, config: NodeConfig, *, polite: bool = False) -> None:
    """Await `run(config)`; the first signal cancels it, later ones are swallowed while it cleans up.

    A `polite` role is run with `stopping`, an event that the first signal sets; then the second one cancels.
    """
    stopping = trio.Event()
    with trio.open_signal_receiver(*SIGNALS) as signals:
        async with trio.open_nursery() as watch:
            work = trio.CancelScope()

            async def stop_on_signal() -> None:
                async for number in signals:
                    _log.info("Stopping", signal=signal.Signals(number).name)
                    if not polite or stopping.is_set():
                        work.cancel()
                    stopping.set()

            watch.start_soon(stop_on_signal)
            with work:
                await (run(config, stopping=stopping) if polite else run(config))
            watch.cancel_scope.cancel()


def _leaves(group: BaseExceptionGroup[HyphaError]) -> Iterator[HyphaError]:
    for each in group.exceptions:
        if isinstance(each, BaseExceptionGroup):
            yield from _leaves(each)
        else:
            yield each
