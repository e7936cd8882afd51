"""Slices from a data node to files that an executor can map, digest verified, against blocking TLS sockets.

    data node ══ fetch_slice ══▶ worker: file on tmpfs, file on disk; sha256 and blake3 by the manifest
    blocking TLS ═════════════▶ the same two processes, memory to memory                    baseline
    nothing ──▶ worker: a file of the same size, plainly written               what the file alone takes, in the detail
    data node ══▶ eight workers in two processes, all at once                                fairness
    data node ══▶ worker ─ path ─▶ reader (the executor's `Rows`)                            samples per second
    HTTP ══▶ mosaicml-streaming, webdataset: the same samples, the same batches              peers

Three repetitions, alternating, ratios of medians. The peers live in an environment of their own, `.bench/loaders`, made
at the first run; without it their figures are left out, and the detail says why. `--gib N` sizes the large slice.
"""

import argparse
import http.server
import itertools
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import msgspec

from benchmarks import slices_data
from benchmarks.certificates import Files, issue
from benchmarks.report import Figure, print_report
from benchmarks.slices_nodes import Command, Done, Role, Serving

GIB = 1 << 30
REPETITIONS = 3
FETCHERS, FETCHER_PROCESSES = 8, 2
BATCH = 64
SPEED_WANTED, SHARE_WANTED, PEERS_WANTED = 0.6, 0.7, 1.0
ALGORITHMS = ("sha256", "blake3")
LARGE = "train-00000.safetensors"
ENVIRONMENT = Path(".bench/loaders")
# torch is that of constraints.txt, so that both sides collate with the same code.
PINNED = (
    "mosaicml-streaming==0.13.0",
    "webdataset==1.0.2",
    "torch==2.13.0",
    "torchvision==0.28.0",
    "safetensors==0.8.0",
)
PEERS = ("mosaic", "webdataset")

T = TypeVar("T")


class Child:
    """Another process that answers each JSON line with one."""

    def __init__(self, stack: ExitStack, arguments: list[str]) -> None:
        command = [sys.executable, "-m", *arguments]
        self._process = stack.enter_context(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )
        stack.callback(self._process.terminate)

    def tell(self, text: str) -> None:
        """Send one line."""
        assert self._process.stdin is not None
        self._process.stdin.write(text + "\n")
        self._process.stdin.flush()

    def end(self) -> None:
        """Send no more."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def hear(self) -> str:
        """Return the next line."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "a process of the benchmark ended early; its last words are above"
        return line

    def ask(self, command: Command) -> None:
        """Send one command."""
        self.tell(msgspec.json.encode(command).decode())

    def answer(self, kind: type[T]) -> T:
        """Return the next answer."""
        return msgspec.json.decode(self.hear(), type=kind)


class Bench(msgspec.Struct, frozen=True):
    """All processes, and where things lie: the sets, a directory on tmpfs and one on disk."""

    server: Child
    fetchers: list[Child]
    sets: Path
    shm: Path
    disk: Path

    def cpu(self) -> float:
        """Return the server's processor time so far."""
        self.server.ask(Command("cpu"))
        return self.server.answer(Done).cpu_s


def start(stack: ExitStack, folder: Path, sets: Path, shm: Path, datasets: list[Path]) -> Bench:
    """Start the server and the fetchers."""
    names = {"gateway": "gateway", "data": "data"} | {f"worker-{number}": "worker" for number in range(FETCHERS)}
    files = issue(folder, names)

    def child(name: str, role: Role) -> Child:
        told = folder / f"{name}.json"
        told.write_bytes(msgspec.json.encode(role, enc_hook=str))
        return Child(stack, ["benchmarks.slices_nodes", str(told)])

    server = child("server", Role("serve", [files["gateway"], files["data"]], datasets))
    at = server.answer(Serving)
    fetchers = []
    for number in range(FETCHER_PROCESSES):
        mine: list[Files] = [files[f"worker-{each}"] for each in range(number, FETCHERS, FETCHER_PROCESSES)]
        fetchers.append(child(f"fetch-{number}", Role("fetch", mine, [], at.gateway, at.tls_port)))
        fetchers[-1].answer(Done)
    disk = folder / "fetched"
    disk.mkdir()
    return Bench(server, fetchers, sets, shm, disk)


# --- speed -----------------------------------------------------------------------------------------------------------


def timed(bench: Bench, command: Command, size: int) -> dict[str, float]:
    """Return MB/s of one command of one fetcher, and the processor seconds per GiB at both ends."""
    before = bench.cpu()
    bench.fetchers[0].ask(command)
    done = bench.fetchers[0].answer(Done)
    sent = bench.cpu() - before
    return {
        "mb_s": round(size / done.seconds[0] / 1e6, 1),
        "receiver_cpu_s_gib": round(done.cpu_s * GIB / size, 3),
        "sender_cpu_s_gib": round(sent * GIB / size, 3),
    }


def speeds(bench: Bench, size: int) -> dict[str, list[dict[str, float]]]:
    """Time the baseline and every way of fetching, alternating; each file is removed at once."""
    runs: dict[str, list[dict[str, float]]] = {}
    places = {"tmpfs": bench.shm, "disk": bench.disk}
    ways = [("file_alone", Command("file", names=[LARGE], bytes=size))]
    ways += [(algorithm, Command("slices", f"large-{algorithm}", [LARGE])) for algorithm in ALGORITHMS]
    for _ in range(REPETITIONS):
        runs.setdefault("blocking_tls", []).append(timed(bench, Command("blocking", bytes=size), size))
        for (way, command), (place, directory) in itertools.product(ways, places.items()):
            there = msgspec.structs.replace(command, directory=str(directory))
            runs.setdefault(f"{way}_{place}", []).append(timed(bench, there, size))
            (directory / LARGE).unlink()
    return runs


def shares(bench: Bench, size: int) -> list[float]:
    """Return, per repetition, the slowest of all fetchers' rates over their mean."""
    found = []
    command = Command("slices", "large-blake3", [LARGE], str(bench.shm), FETCHERS // FETCHER_PROCESSES)
    for _ in range(REPETITIONS):
        # All are to begin at once, and what is measured is the transfer: who provides it is found before.
        for child in bench.fetchers:
            child.ask(msgspec.structs.replace(command, names=[]))
            child.answer(Done)
        for number, child in enumerate(bench.fetchers):
            place = bench.shm / str(number)
            place.mkdir(exist_ok=True)
            child.ask(msgspec.structs.replace(command, directory=str(place)))
        rates = [size / each for child in bench.fetchers for each in child.answer(Done).seconds]
        found.append(round(min(rates) / statistics.mean(rates), 3))
        for number in range(FETCHER_PROCESSES):
            shutil.rmtree(bench.shm / str(number))
    return found


# --- samples per second ----------------------------------------------------------------------------------------------


class Epoch(msgspec.Struct):
    """What a reader says of one."""

    samples: int
    digest: str
    seconds: float = 0.0
    ended: float = 0.0


def ours(bench: Bench, which: slices_data.Set, *, digest: bool) -> dict[str, Epoch]:
    """One epoch while the slices come, and one with all of them here."""
    local = bench.disk / which.name
    local.mkdir()
    paths: list[str] = []
    epochs = {}
    for name in ("cold", "warm"):
        with ExitStack() as stack:
            flags = ["--digest"] if digest else []
            schema = msgspec.json.encode(which.schema).decode()
            reader = Child(stack, ["benchmarks.slices_reader", schema, str(BATCH), *flags])
            reader.hear()
            started = time.perf_counter()
            for path in paths or _fetched(bench, which, local):
                reader.tell(path)
                if name == "cold":
                    paths = [*paths, path]
            reader.end()
            epochs[name] = reader.answer(Epoch)
            epochs[name].seconds = epochs[name].ended - started
    shutil.rmtree(local)
    return epochs


def _fetched(bench: Bench, which: slices_data.Set, local: Path) -> Iterator[str]:
    names = [f"train-{number:05d}.safetensors" for number in range(which.slices)]
    bench.fetchers[0].ask(Command("slices", which.name, names, str(local)))
    while path := bench.fetchers[0].answer(Done).path:
        yield path


def theirs(bench: Bench, python: Path, peer: str, which: slices_data.Set, *, digest: bool) -> dict[str, Epoch]:
    """The same with one of the peers, from a web server of this process."""
    local = bench.disk / peer
    with served(bench.sets / f"{which.name}-peers" / peer) as url:
        command = [python, "benchmarks/peers/loaders.py", peer, url, local, str(BATCH), "--shards", str(which.slices)]
        flags = ["--digest"] if digest else []
        said = subprocess.run([*map(str, command), *flags], check=True, stdout=subprocess.PIPE).stdout
    shutil.rmtree(local)
    return msgspec.json.decode(said.splitlines()[-1], type=dict[str, Epoch])


class _Quiet(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def served(directory: Path) -> Iterator[str]:
    """Serve a directory on loopback HTTP, from this process, which has nothing else to do."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(directory))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def rates(bench: Bench, python: Path | None) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Samples per second: set, reader, epoch, repetitions. All readers must have seen the same bytes."""
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for which in (slices_data.TOKENS, slices_data.IMAGES):
        peers = PEERS if python is not None else ()
        if python is not None:
            target = bench.sets / f"{which.name}-peers"
            target.mkdir()
            make = [python, "benchmarks/peers/loaders.py", "make", bench.sets / which.name, target]
            subprocess.run([str(each) for each in make], check=True)
        contents = set()
        for repetition in range(REPETITIONS + 1):
            digest = repetition == 0  # the first is not timed: it compares what was read
            for reader in ("ours", *peers):
                if reader == "ours":
                    epochs = ours(bench, which, digest=digest)
                else:
                    assert python is not None
                    epochs = theirs(bench, python, reader, which, digest=digest)
                if digest:
                    contents |= {(epoch.samples, epoch.digest) for epoch in epochs.values()}
                    continue
                for name, epoch in epochs.items():
                    per_reader = found.setdefault(which.name, {}).setdefault(reader, {})
                    per_reader.setdefault(name, []).append(round(epoch.samples / epoch.seconds))
        assert len(contents) == 1, f"the readers of {which.name} disagree about its content: {contents}"
    return found


def environment() -> tuple[Path | None, str]:
    """Return the peers' Python, made where it is missing, or why there is none."""
    python = ENVIRONMENT / "bin" / "python"
    try:
        if not (ENVIRONMENT / ".complete").exists():
            subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PINNED], check=True)
            (ENVIRONMENT / ".complete").touch()
    except (OSError, subprocess.CalledProcessError) as error:
        return None, f"the peers could not be installed: {error}"
    return python, ", ".join(PINNED)


# --- the report ------------------------------------------------------------------------------------------------------


def figures_of(
    runs: dict[str, list[dict[str, float]]], fair: list[float], found: dict[str, dict[str, dict[str, list[float]]]]
) -> list[Figure]:
    """Ratios of medians."""
    median = {name: statistics.median(run["mb_s"] for run in each) for name, each in runs.items()}
    base = median.pop("blocking_tls")
    figures = [
        Figure(f"slice_{name}_to_blocking_tls", round(got / base, 3), SPEED_WANTED, "higher", "ratio")
        for name, got in median.items()
        if not name.startswith("file_alone")
    ]
    figures.append(
        Figure("slowest_of_eight_to_mean", round(statistics.median(fair), 3), SHARE_WANTED, "higher", "ratio")
    )
    for name, readers in found.items():
        for epoch in ("cold", "warm"):
            for peer in PEERS:
                if peer in readers:
                    got = statistics.median(readers["ours"][epoch]) / statistics.median(readers[peer][epoch])
                    figures.append(Figure(f"{name}_{epoch}_to_{peer}", round(got, 2), PEERS_WANTED, "higher", "ratio"))
    return figures


def main() -> None:
    """Make the data, measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0)
    asked = parser.parse_args()
    python, peers = environment()
    ENVIRONMENT.parent.mkdir(exist_ok=True)
    with ExitStack() as stack:
        folder, shm = (
            Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hypha-bench-", dir=each)))
            for each in (ENVIRONMENT.parent.absolute(), "/dev/shm")
        )
        sets = folder / "sets"
        size = slices_data.write_large(sets / "large-sha256", int(asked.gib * GIB), "sha256").slices[0].bytes
        slices_data.write_large(sets / "large-blake3", int(asked.gib * GIB), "blake3")
        for which in (slices_data.TOKENS, slices_data.IMAGES):
            slices_data.write_set(sets / which.name, which)
        datasets = [sets / name for name in ("large-sha256", "large-blake3", "tokens", "images")]
        with ExitStack() as processes:
            bench = start(processes, folder, sets, shm, datasets)
            runs = speeds(bench, size // slices_data.PIECE_BYTES * slices_data.PIECE_BYTES)
            fair = shares(bench, size)
            found = rates(bench, python)
    detail = {"gib": asked.gib, "speeds": runs, "fair": fair, "samples_per_s": found, "batch": BATCH, "peers": peers}
    print_report("slices", figures_of(runs, fair, found), detail)


if __name__ == "__main__":
    main()
