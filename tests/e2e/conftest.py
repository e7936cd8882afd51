"""One run of the demo that several tests look at, with an OTLP collector listening."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec import Struct

from tests.e2e.programs import run
from tests.otlp_receiver import Collector, otlp_receiver


class Watched(Struct, frozen=True):
    """A demo that has ended: its exit code, what it printed, its directory, and what the collector received."""

    code: int
    output: str
    directory: Path
    collector: Collector

    @property
    def summary(self) -> dict[str, Any]:
        """The object that `--json` printed."""
        return json.loads(self.output.splitlines()[-1])


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """Run two rounds with three workers; the directory is removed in the end, models are large."""
    directory = tmp_path_factory.mktemp("demo") / "run"
    with otlp_receiver() as collector:
        command = ["hypha", "demo", "--json", "--rounds", "2", "--dir", str(directory), "--otlp", collector.grpc_url]
        code, output = run(command, directory.parent, timeout_s=240)
        yield Watched(code, output, directory, collector)
    shutil.rmtree(directory, ignore_errors=True)
