"""Coded files: updates as they travel, written and read piece by piece as the fp32 they stand for.

    pieces of θ_start − θ_end ─▶ CodedWriter ─▶ file ─▶ CodedReader ─▶ pieces, as the sender's `append` returned them

With codec `none` these are the files of hypha.training.tensors, to the last bit. A reader believes nothing: the header
must be the one that follows from codec and shapes before anything is read, and every decoded piece is checked.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from hypha.errors import RemoteProtocolError
from hypha.protocol.compression import CHUNK_ELEMENTS, Coding
from hypha.training import codecs, tensors
from hypha.training.arriving import Arriving
from hypha.training.tensors import PIECE_ELEMENTS, FileWriter, Piece, Reader, Shapes, pieces_of

# Randomness by tensor: a tensor is coded the same whichever others share its file.
Generators = Callable[[str], torch.Generator]

assert PIECE_ELEMENTS % CHUNK_ELEMENTS == 0, "a piece is whole rows, except a tensor's last"


class CodedWriter(FileWriter):
    """Writes one coded file, pieces in file order."""

    def __init__(self, path: Path, shapes: Shapes, coding: Coding, generators: Generators | None = None) -> None:
        super().__init__(path, (coding.spec(name, tuple(shape)) for name, shape in shapes.items()))
        self._coding, self._generators = coding, generators
        self._generator: torch.Generator | None = None

    def append(self, piece: Piece, elements: torch.Tensor) -> torch.Tensor:
        """Write the next piece, and return what readers will find. Raises RemoteProtocolError: it cannot be coded."""
        if self._generators is not None and piece.start == 0:
            self._generator = self._generators(piece.name)
        try:
            data = codecs.encode(elements, self._coding, self._generator)
        except RemoteProtocolError as error:
            raise RemoteProtocolError(f"tensor {piece.name!r}: {error}") from error
        self.put(data)
        return codecs.decode(data, elements.numel(), self._coding)


class CodedReader:
    """Reads one coded file of a model's shapes. Raises RemoteProtocolError naming the file and the fault."""

    def __init__(self, path: Path, shapes: Shapes, coding: Coding, arriving: Arriving | None = None) -> None:
        self._file, self._shapes, self._coding = Reader(path, arriving), shapes, coding
        fault = coding.mismatch(self._file.layout, shapes)
        if fault is not None:
            raise RemoteProtocolError(f"{path.name}: {fault}")

    def part(self, piece: Piece) -> torch.Tensor:
        """Return some elements of a tensor, flat, fp32: from the beginning of a row, to a row's or the tensor's end."""
        start, count = self._coding.bytes_of(piece.start), piece.stop - piece.start
        data = self._file.raw(self._coding.name(piece.name), start, start + self._coding.bytes_of(count))
        try:
            return codecs.decode(data, count, self._coding)
        except RemoteProtocolError as error:
            raise RemoteProtocolError(f"{self._file.path.name}: tensor {piece.name!r}: {error}") from error

    def check(self) -> None:
        """Decode everything once. Raises RemoteProtocolError: something does not decode."""
        for piece in pieces_of(self._shapes):
            self.part(piece)


def screen(path: Path, shapes: Shapes, coding: Coding) -> str | None:
    """Say why a coded pseudo-gradient must not be merged; None if it may. Holds one piece at a time."""
    if coding.codec == "none":
        return tensors.screen(path, shapes)
    try:
        CodedReader(path, shapes, coding).check()
    except RemoteProtocolError as error:
        return str(error)
    return None
