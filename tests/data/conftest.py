"""One small dataset, and a fabric without faults to serve it on."""

import shutil
from pathlib import Path

import pytest

from hypha.dataset_tool import prepare
from hypha.network.memory import MemoryFabric
from hypha.network.memory_faults import FaultProfile
from tests.data.cast import SEED


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "book.txt").write_text("".join(f"line {n} of a book\n" for n in range(30_000)))
    prepare([folder / "book.txt"], folder / "set", name="book", slice_bytes=200_000)
    return folder / "set"


@pytest.fixture
def directory(prepared, tmp_path):
    return Path(shutil.copytree(prepared, tmp_path / "set"))


@pytest.fixture
def fabric():
    return MemoryFabric(SEED, FaultProfile())
