"""The text that the demo learns from where none is given: the source of Python's standard library.

It is real, on every machine that runs this, and large enough (about 4.7 MB) that no sample comes twice.
"""

import sysconfig
from pathlib import Path

from msgspec import Struct

from hypha.errors import ConfigError


class Corpus(Struct, frozen=True):
    """Text to prepare: `sources` for the command, `shown` as a person would type it."""

    sources: tuple[str, ...]
    shown: str
    title: str


def standard_library() -> Corpus:
    """Return the modules at the top of the standard library. Raises ConfigError where their source is not installed."""
    folder = Path(sysconfig.get_path("stdlib"))
    sources = tuple(str(path) for path in sorted(folder.glob("*.py")))
    if not sources:
        raise ConfigError(f"{folder} holds no Python source; give some text with --text")
    return Corpus(sources, f"'{folder}'/*.py", "the source of Python's standard library")


def given(text: list[Path]) -> Corpus:
    """Return files and folders as they were named. Raises ConfigError for one that does not exist."""
    for path in text:
        if not path.exists():
            raise ConfigError(f"--text: {path}: no such file or folder")
    sources = tuple(str(path.absolute()) for path in text)
    return Corpus(sources, " ".join(f"'{source}'" for source in sources), ", ".join(map(str, text)))
