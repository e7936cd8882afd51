"""What both executors do around their work: arguments, bridge, telemetry, exit code.

    --socket S --work-dir W --job J ─▶ Session, JobSpec ─▶ work(session, job, work_dir) ─▶ 0
                                                              ├─ HyphaError ─▶ ExecutorFailed(reason) ─▶ 1
                                                              └─ bridge gone ─────────────────────────▶ 1

Interpreter and torch run with HYPHA_THREADS threads; one if it is not set, because several executors share a machine.
"""

import argparse
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import torch

from hypha.errors import ConfigError, HyphaError
from hypha.protocol.bridge import ExecutorFailed
from hypha.protocol.job import JobSpec
from hypha.telemetry import executor_start, get_logger
from hypha.training.session import BridgeClosed, BridgeRefused, Session

log = get_logger("training.executor")

Work = Callable[[Session, JobSpec, Path], None]

# After the bridge is gone an inner step may still end by itself; a device that hangs is left to the kernel.
LOST_GRACE_S = 5.0
# Telemetry that cannot be handed over within this is lost rather than waited for.
TELEMETRY_SHUTDOWN_S = 4.0
REASON_CHARS_MAX = 8000


def end_soon() -> None:
    """End this process from outside its main thread, should that not notice that the bridge is gone."""
    timer = threading.Timer(LOST_GRACE_S, os._exit, (1,))
    timer.daemon = True
    timer.start()


def run(
    work: Work, name: str, arguments: Sequence[str] | None = None, *, on_lost: Callable[[], None] = end_soon
) -> int:
    """Do `work` as a whole process would, and return its exit code."""
    given = _parse(name, arguments)
    try:
        with Session(given.socket, on_lost=on_lost) as session:
            return _work(work, name, session, given)
    except BridgeClosed as error:
        log.warn("The worker is gone", reason=str(error))
        return 1


def _parse(name: str, arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m hypha.training.{name}")
    parser.add_argument("--socket", type=Path, required=True, help="the job's bridge")
    parser.add_argument("--work-dir", type=Path, required=True, help="the job's own directory")
    parser.add_argument("--job", type=Path, required=True, help="JSON file of the job")
    return parser.parse_args(arguments)


def _work(work: Work, name: str, session: Session, given: argparse.Namespace) -> int:
    telemetry = executor_start(f"hypha-{name}", session.post_otlp)
    try:
        torch.set_num_threads(_threads(os.environ.get("HYPHA_THREADS", "1")))
        log.info("Executor started", work=name)
        work(session, load_job(given.job), given.work_dir.absolute())
    except BridgeClosed:
        raise
    except HyphaError as error:
        log.error("Executor failed", reason=str(error))  # noqa: TRY400 - the reason is the message, not the stack
        _say_failed(session, str(error))
        return 1
    except Exception as error:
        _say_failed(session, f"{type(error).__name__}: {error}")
        raise
    finally:
        telemetry.shutdown(TELEMETRY_SHUTDOWN_S)
    return 0


def _threads(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"HYPHA_THREADS: {text!r} is not a number of threads")
    return int(text)


def load_job(path: Path) -> JobSpec:
    """Read the job's JSON file. Raises ConfigError naming the file and the key."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=JobSpec)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path}: {error}") from error


def _say_failed(session: Session, reason: str) -> None:
    try:
        session.report(ExecutorFailed(reason=reason[:REASON_CHARS_MAX]))
    except (BridgeClosed, BridgeRefused) as error:
        log.warn("The worker does not take the reason", reason=str(error))
