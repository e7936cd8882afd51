"""Which text goes into a dataset, and how it becomes ids.

    sources ─ walk ─▶ files ─ scan: UTF-8 and no NUL? ─▶ documents ─ by hash, up to a limit ─▶ train │ held-out
    document ─ pieces of whole lines ─▶ ids … separator

Nothing here depends on where the files lie or on the order of a directory: documents are ordered by the hash of their
names relative to the source.
"""

import codecs
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec import Struct

from hypha.errors import ConfigError, StoreError
from hypha.telemetry import get_logger

if TYPE_CHECKING:
    from tokenizers import Tokenizer

log = get_logger("dataset")

READ_BYTES = 1 << 20
# Never part of text as we accept it, so it marks the end of a document whatever the text is.
SEPARATOR = b"\x00"
# What belongs to tools or to other packages; anything in it can still be named as a source of its own.
FOLDERS_SKIPPED = frozenset({"__pycache__", "node_modules", "site-packages", "dist-packages"})
WARNINGS_MAX = 10
# A held-out file may overshoot the share wanted by this factor before it is passed over for a smaller one.
OVERSHOOT = 1.5
END_OF_TEXT_TOKENS = ("<|endoftext|>", "</s>", "<eos>", "[SEP]")
IdArray = np.ndarray[Any, np.dtype[Any]]


class Document(Struct, frozen=True):
    """Bytes [start, stop) of a text file; `key` is its name whatever the machine."""

    key: str
    path: Path
    start: int
    stop: int

    @property
    def size(self) -> int:
        """How much text it is."""
        return self.stop - self.start

    def order(self, purpose: str) -> bytes:
        """Return where it stands in an order that looks like chance and is always the same."""
        return hashlib.sha256(f"{purpose}:{self.key}".encode("utf-8", "surrogateescape")).digest()


class Encoding(Struct, frozen=True):
    """How text becomes ids: bytes as they are, or a tokenizer's."""

    label: str
    vocabulary: int
    dtype: str  # SafeTensors
    tokenizer: "Tokenizer | None" = None

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """Little-endian, as SafeTensors has it."""
        return np.dtype({"U8": "u1", "U16": "<u2", "I32": "<i4"}[self.dtype])

    def ids(self, text: bytes) -> IdArray:
        """Return the ids of a piece of text."""
        if self.tokenizer is None:
            return np.frombuffer(text, dtype="u1")
        found = self.tokenizer.encode(text.decode("utf-8", "ignore"), add_special_tokens=False).ids
        return np.asarray(found, dtype=self.numpy_dtype)

    def separator(self) -> IdArray:
        """Return what ends a document: an end-of-text token, where the tokenizer has one."""
        if self.tokenizer is not None:
            for token in END_OF_TEXT_TOKENS:
                if (found := self.tokenizer.token_to_id(token)) is not None:
                    return np.asarray([found], dtype=self.numpy_dtype)
            return self.ids(b"\n\n")
        return self.ids(SEPARATOR)


# --- which text ------------------------------------------------------------------------------------------------------


def split_held_out(
    documents: list[Document], *, share: float, seed: int, bytes_min: int
) -> tuple[list[Document], list[Document]]:
    """Return (train, held-out): whole files in the order of their hashes until the share is reached.

    Where no file is small enough for that (one large file, say), the end of the largest is cut off instead.
    Raises ConfigError when there is not enough text for both.
    """
    total = sum(document.size for document in documents)
    target = max(int(share * total), bytes_min) if share > 0 else 0
    if total < target + bytes_min:
        raise ConfigError(f"{total} bytes of text are too few: {target + bytes_min} needed")
    chosen: list[Document] = []
    reached = 0
    for document in sorted(documents, key=lambda each: each.order(f"{seed}:held-out")):
        if reached < target and reached + document.size <= OVERSHOOT * target:
            chosen.append(document)
            reached += document.size
    if reached < target:
        chosen, documents = _cut_tail(documents, target)
    kept = set(chosen)
    return [each for each in documents if each not in kept], chosen


def _cut_tail(documents: list[Document], target: int) -> tuple[list[Document], list[Document]]:
    largest = max(documents, key=lambda each: (each.size, each.key))
    cut = max(largest.start, largest.stop - target)
    head = Document(largest.key, largest.path, largest.start, cut)
    tail = Document(largest.key, largest.path, cut, largest.stop)
    return [tail], [head if each is largest else each for each in documents]


def bounded(documents: Iterable[Document], max_bytes: int | None, seed: int) -> Iterator[Document]:
    """Yield documents as if by chance, up to so many bytes; the last one is cut."""
    left = max_bytes
    for document in sorted(documents, key=lambda each: (each.order(str(seed)), str(each.path))):
        if left is None:
            yield document
        elif left > 0:
            stop = min(document.stop, document.start + left)
            left -= stop - document.start
            yield Document(document.key, document.path, document.start, stop)


def documents_in(sources: list[Path], out: Path) -> Iterator[Document]:
    """Yield every text file of the sources but those in `out`; warn of what is skipped. Raises ConfigError."""
    skipped = 0
    for key, path in _files(sources, out):
        size, fault = _scan(path)
        if fault is None and size > 0:
            yield Document(key, path, 0, size)
        elif fault is not None:
            skipped += 1
            if skipped <= WARNINGS_MAX:
                # The name is part of the sentence: a command line shows sentences, not fields.
                said = f"{path}: {fault}, skipped"
                log.warn(said)
    if skipped > WARNINGS_MAX:
        said = f"{skipped - WARNINGS_MAX} more files skipped"
        log.warn(said)


def _files(sources: list[Path], out: Path) -> Iterator[tuple[str, Path]]:
    seen: set[Path] = {out.resolve()}
    for source in sources:
        if not source.exists():
            raise ConfigError(f"{source}: no such file or folder")
        for path in _walk(source, seen) if source.is_dir() else [source]:
            real = path.resolve()
            if real not in seen:
                seen.add(real)
                yield (path.relative_to(source).as_posix() if source.is_dir() else path.name), path


def _walk(folder: Path, without: set[Path]) -> Iterator[Path]:
    for where, folders, files in os.walk(folder):
        here = Path(where)
        folders[:] = sorted(
            name
            for name in folders
            if name not in FOLDERS_SKIPPED and not name.startswith(".") and (here / name).resolve() not in without
        )
        yield from (here / name for name in sorted(files))


def _scan(path: Path) -> tuple[int, str | None]:
    """Return the size of a text file, and why it is none."""
    if not path.is_file():
        return 0, "not a regular file"
    size, decoder = 0, codecs.getincrementaldecoder("utf-8")()
    try:
        with path.open("rb") as file:
            while chunk := file.read(READ_BYTES):
                if SEPARATOR in chunk:
                    return size, "binary"
                decoder.decode(chunk)
                size += len(chunk)
            decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return size, "not UTF-8"
    except OSError as error:
        return size, str(error.strerror)
    return size, None


# --- text to ids -----------------------------------------------------------------------------------------------------


def bytes_encoding() -> Encoding:
    """Return the encoding whose ids are the bytes of the text."""
    return Encoding("bytes", 256, "U8")


def tokenizer_encoding(path: Path) -> Encoding:
    """Return the encoding of a tokenizer.json, or of the directory that holds one. Raises ConfigError."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ConfigError("--tokenizer needs the package `tokenizers`: pip install tokenizers") from error
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"{file}: no such tokenizer file")
    found = Tokenizer.from_file(str(file))
    vocabulary = found.get_vocab_size()
    label = hashlib.sha256(file.read_bytes()).hexdigest()
    return Encoding(f"sha256:{label}", vocabulary, "U16" if vocabulary <= 1 << 16 else "I32", found)


def ids_of(documents: Iterable[Document], encoding: Encoding) -> Iterator[IdArray]:
    """Yield the ids of all documents piece by piece, a separator after each. Raises StoreError."""
    separator = encoding.separator()
    for document in documents:
        for piece in _pieces(document):
            yield encoding.ids(piece)
        yield separator


def _pieces(document: Document) -> Iterator[bytes]:
    """Yield a document's text, in pieces that end with a line where they can: tokenizers must not see half a word."""
    held, left = b"", document.size
    try:
        with document.path.open("rb") as file:
            file.seek(document.start)
            while left > 0 and (chunk := file.read(min(READ_BYTES, left))):
                left -= len(chunk)
                head, newline, held_next = chunk.rpartition(b"\n")
                yield held + head + newline
                held = held_next
    except OSError as error:
        raise StoreError(f"{document.path}: {error.strerror}") from error
    yield held
