"""Log files as they grow: what every process of the demo writes on standard error.

DIR/logs/NAME.log ─▶ whole lines ─▶ LogLine(source, level, message, fields)
                                    a line that is no JSON object: level "", the text as message
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

# Of one file at a time, so that a process that writes without end cannot starve the others.
READ_BYTES = 1 << 20
# A line that long is no log line; its beginning says enough.
LINE_BYTES_MAX = 1 << 16


class LogLine(Struct, frozen=True):
    """One line of one process; `fields` is empty where it is not ours."""

    source: str
    message: str
    level: str = ""
    component: str = ""
    fields: Mapping[str, Any] = {}

    def number(self, name: str) -> float:
        """Return a numeric field, 0 where it is missing or no number."""
        value = self.fields.get(name)
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else 0.0

    def text(self, name: str) -> str:
        """Return a field as text, empty where it is missing."""
        value = self.fields.get(name)
        return "" if value is None else str(value)


def parse(source: str, line: str) -> LogLine:
    """Read one line, whatever it is."""
    try:
        found = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeEncodeError):
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("message"), str):
        return LogLine(source, line)
    return LogLine(source, found["message"], str(found.get("level", "")), str(found.get("component", "")), found)


class LogFile:
    """A log file that grows; each call of `news` returns the lines that were completed since the last one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._rest = b""

    def news(self, *, last: bool = False) -> Iterator[LogLine]:
        """Yield new lines; with `last`, also one that no newline ends. A file that is not there yet is empty."""
        while chunk := self._read():
            *lines, self._rest = (self._rest + chunk).split(b"\n")
            self._rest = self._rest[:LINE_BYTES_MAX]
            for line in lines:
                yield from self._parsed(line)
        if last and self._rest:
            rest, self._rest = self._rest, b""
            yield from self._parsed(rest)

    def _read(self) -> bytes:
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                chunk = file.read(READ_BYTES)
        except FileNotFoundError:
            return b""
        self._offset += len(chunk)
        return chunk

    def _parsed(self, line: bytes) -> Iterator[LogLine]:
        if text := line[:LINE_BYTES_MAX].decode(errors="replace").strip():
            yield parse(self._path.stem, text)
