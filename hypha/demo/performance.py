"""One run of the demo, from an empty directory to a report.

    setup ─▶ certificates ─▶ gateway, workers ─▶ data node ─▶ scheduler ═▶ rounds ═▶ job done ─▶ nodes stop ─▶ export
             dataset (beside all that) ─────────────┘                                                └─▶ report, plot

Whatever ends it early, a failure or a signal, ends every process first; then the report is written all the same.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec
import trio

from hypha.demo import commands, nodes
from hypha.demo.commands import Command
from hypha.demo.corpus import Corpus
from hypha.demo.display import Display
from hypha.demo.loglines import LogFile
from hypha.demo.nodes import DATA, GATEWAY, SCHEDULER, Cast
from hypha.demo.processes import DemoFailed, Processes, processes
from hypha.demo.progress import Progress
from hypha.demo.report import JSON_NAME, PLOT_NAME, Exported, Report, report_of, write
from hypha.errors import StoreError

# Logs are read this often: a reader's delay, not the network's.
READ_LOGS_S = 0.1
# Nodes import py-libp2p in two seconds, several times that when many start on few cores.
READY_S = 90.0
# The scheduler ends with these.
EXIT_DONE, EXIT_FAILED = 0, 1
# What the nodes must say for progress to be seen; the user's own HYPHA_LOG comes after it and wins.
LOG_LEVELS = "info"


class Performance:
    """Runs it once. `report` is there whatever happened."""

    def __init__(self, directory: Path, cast: Cast, corpus: Corpus, display: Display) -> None:
        self._directory = directory
        self._cast = cast
        self._corpus = corpus
        self._display = display
        self._progress = Progress(rounds_wanted=cast.rounds)
        self._phases: dict[str, float] = {}
        self._began = time.monotonic()
        self._logs = {name: LogFile(directory / "logs" / f"{name}.log") for name in cast.roles}
        self._news = trio.Event()
        self._exported: Exported | None = None
        self._failure: str | None = "interrupted"

    async def run(self) -> None:
        """Play until the end; a failure is in the report, not raised. Cancelling it leaves no process behind."""
        environment = environment_for_nodes(os.environ, otlp=self._cast.otlp is not None)
        with self._phase("setup"):
            self._set_up()
        try:
            with processes(self._directory, environment, self._lost) as running:
                try:
                    await self._play(running)
                    self._failure = None
                except* DemoFailed as group:
                    self._failure = self._progress.failure or "; ".join(_reasons(group))
                await self._draw(running)
        finally:
            self._read_logs(last=True)
            write(self.report(), self._directory)

    def report(self) -> Report:
        """Return the report as of now."""
        return report_of(
            self._progress,
            text=self._corpus.title,
            workers=self._cast.workers,
            wall_s=time.monotonic() - self._began,
            phases=self._phases,
            exported=self._exported,
            failure=self._failure,
        )

    # --- acts ---------------------------------------------------------------------------------------------------------

    def _set_up(self) -> None:
        try:
            (self._directory / "logs").mkdir(parents=True)
            nodes.write_configs(self._directory / "configs", self._cast)
            commands.write_script(self._directory, self._cast, self._corpus)
        except OSError as error:
            raise StoreError(f"{error.filename}: {error.strerror}") from error

    async def _play(self, running: Processes) -> None:
        async with trio.open_nursery() as watching:
            watching.start_soon(self._follow)
            async with trio.open_nursery() as network:
                await self._open_network(running, network)
                await self._schedule(running)
                network.cancel_scope.cancel()
            self._read_logs(last=True)
            await self._export(running)
            watching.cancel_scope.cancel()

    async def _open_network(self, running: Processes, network: trio.Nursery) -> None:
        prepared = trio.Event()

        async def prepare() -> None:
            with self._phase("dataset"):
                await self._step(running, commands.dataset(self._corpus))
            prepared.set()

        network.start_soon(prepare)
        with self._phase("certificates"):
            await self._issue(running)
        self._display.say(f"certificates: root, organisation and {len(self._cast.roles)} nodes")
        with self._phase("network start"):
            self._start(running, network, GATEWAY)
            for name in self._cast.worker_names:
                self._start(running, network, name)
            await prepared.wait()
            self._start(running, network, DATA)
            await self._until_ready({GATEWAY, DATA, *self._cast.worker_names}, running)
        self._display.say(f"network: {len(self._cast.roles) - 1} nodes are ready, met at {self._cast.gateway_address}")

    async def _issue(self, running: Processes) -> None:
        for command in commands.authorities():
            await self._step(running, command)
        async with trio.open_nursery() as nursery:
            for command in commands.certificates(self._cast):
                nursery.start_soon(self._step, running, command)
        shown = await self._step(running, commands.show(self._cast))
        self._progress.names = dict(_names(shown))

    async def _schedule(self, running: Processes) -> None:
        """Run the scheduler until its job is done; it is started again if it dies, not if its job failed."""
        began = time.monotonic()

        def is_end(code: int) -> bool:
            self._read_logs()
            finished, failed = self._progress.finished is not None, self._progress.failure is not None
            return (code == EXIT_DONE and finished) or (code == EXIT_FAILED and failed)

        async def note_phases() -> None:
            await self._until(lambda: len(self._progress.leases) >= self._cast.workers)
            leased = time.monotonic()
            await self._until(lambda: self._progress.opened)
            self._phases |= {"leasing": leased - began, "executors start": time.monotonic() - leased}

        async with trio.open_nursery() as nursery:
            nursery.start_soon(note_phases)
            await self._attend(running, SCHEDULER, is_end)
            nursery.cancel_scope.cancel()
        if self._progress.failure is not None:
            raise DemoFailed(self._progress.failure)

    async def _export(self, running: Processes) -> None:
        assert self._progress.finished is not None
        command = commands.export(self._progress.finished, self._directory)
        commands.append_to_script(self._directory, command)
        with self._phase("export"):
            said = await self._step(running, command)
        try:
            exported = msgspec.json.decode(said, type=Exported)
        except msgspec.DecodeError as error:
            raise DemoFailed(f"export said what is no report: {error}") from error
        self._exported = msgspec.structs.replace(exported, model_dir=str(self._directory / exported.model_dir))

    async def _draw(self, running: Processes) -> None:
        self._read_logs(last=True)
        write(self.report(), self._directory)
        if not self._progress.rounds:
            return
        try:
            with self._phase("plot"):
                await self._step(running, commands.plot(JSON_NAME, PLOT_NAME))
        except DemoFailed as error:
            self._display.say(f"no plot: {error}")

    # --- parts --------------------------------------------------------------------------------------------------------

    def _start(self, running: Processes, network: trio.Nursery, name: str) -> None:
        network.start_soon(self._attend, running, name, lambda code: False)

    async def _attend(self, running: Processes, name: str, is_end: Callable[[int], bool]) -> None:
        self._progress.doing[name] = "starts"
        await running.attend(name, commands.node(name, self._cast.roles[name]).arguments, is_end=is_end)

    async def _step(self, running: Processes, command: Command) -> str:
        return await running.step(command.name, command.arguments)

    async def _until_ready(self, wanted: set[str], running: Processes) -> None:
        with trio.move_on_after(READY_S):
            await self._until(lambda: wanted <= self._progress.ready)
            return
        missing = sorted(wanted - self._progress.ready)
        said = "; ".join(f"{name}: {running.last_lines(name)}" for name in missing)
        raise DemoFailed(f"not ready within {READY_S:g} s: {said}")

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._news.wait()

    async def _follow(self) -> None:
        while True:
            self._read_logs()
            self._display.show(self._progress)
            await trio.sleep(READ_LOGS_S)

    def _read_logs(self, *, last: bool = False) -> None:
        for log in self._logs.values():
            for line in log.news(last=last):
                if (sentence := self._progress.take(line)) is not None:
                    self._display.say(sentence)
        news, self._news = self._news, trio.Event()
        news.set()

    def _lost(self, name: str, how: str) -> None:
        self._read_logs()
        self._display.say(self._progress.lost(name, how))

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self._phases[name] = time.monotonic() - began


def environment_for_nodes(environ: Mapping[str, str], *, otlp: bool) -> dict[str, str]:
    """Return the nodes' environment: ours without what would override their files, console scripts first.

    With `otlp`, the standard variables go, too: everything's telemetry is to go where the option says.
    """
    dropped = ("HYPHA_", "OTEL_") if otlp else ("HYPHA_",)
    kept = {key: value for key, value in environ.items() if not key.startswith(dropped)}
    levels = ",".join(filter(None, (LOG_LEVELS, environ.get("HYPHA_LOG"))))
    return kept | {"PATH": f"{commands.programs()}{os.pathsep}{environ.get('PATH', '')}", "HYPHA_LOG": levels}


def _reasons(group: BaseExceptionGroup[DemoFailed]) -> Iterator[str]:
    for each in group.exceptions:
        if isinstance(each, BaseExceptionGroup):
            yield from _reasons(each)
        else:
            yield str(each)


def _names(shown: str) -> Iterator[tuple[str, str]]:
    """Yield (peer id, node's name) from what `hypha-certutil show --json` printed."""
    for line in shown.splitlines():
        entry = msgspec.json.decode(line)
        if entry.get("kind") == "node":
            yield entry["peer_id"], Path(entry["file"]).stem
