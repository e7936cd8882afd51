"""A transfer's two halves run at the same time: whichever fails first, the caller learns the reason."""

import errno
import os

import pytest

from hypha.errors import StoreError
from hypha.network.transfer import CHUNK_BYTES, receive_file
from hypha.runtime import RealRuntime

SIZE = 8 * CHUNK_BYTES
# Which half runs first after the disk failed is trio's choice, a fair coin.
TRIES = 20


class Ready:
    """A stream whose bytes are there before they are asked for."""

    async def receive_some(self, bytes_max: int) -> bytes:
        return bytes(bytes_max)


class InPlace(RealRuntime):
    """Does blocking work where it is asked for: nothing runs between its failure and what its caller makes of it."""

    async def run_blocking(self, function, *arguments):
        return function(*arguments)


async def test_a_full_disk_is_the_reason_even_where_the_receiving_half_notices_first(tmp_path, monkeypatch):
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwritev", full)
    for number in range(TRIES):
        with pytest.raises(StoreError, match=r"\.part: No space left"):
            await receive_file(Ready(), tmp_path / f"copy-{number}", size=SIZE, digest="", runtime=InPlace())
