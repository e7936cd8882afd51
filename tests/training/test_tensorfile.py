"""The canonical layout: the same bytes as the reference implementation, and no trust in anybody's header."""

import json

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from hypha.errors import RemoteProtocolError
from hypha.protocol.tensorfile import HEADER_BYTES_MAX, TensorSpec, header_length, layout, parse_header

SHAPES = st.dictionaries(
    st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__"),
    st.lists(st.integers(0, 4), max_size=3).map(tuple),
    max_size=6,
)


def header_of(entries, *, data_bytes):
    text = json.dumps(entries).encode()
    header = len(text).to_bytes(8, "little") + text
    return header, len(header) + data_bytes


@given(SHAPES)
def test_fp32_files_start_with_the_reference_implementations_bytes(shapes):
    header, _ = layout(TensorSpec(name, "F32", shape) for name, shape in shapes.items())
    reference = safetensors.torch.save({name: torch.zeros(shape) for name, shape in shapes.items()})
    assert reference[: len(header)] == header or not shapes


@given(SHAPES)
def test_what_was_laid_out_is_read_back(shapes):
    header, places = layout(TensorSpec(name, "F32", shape) for name, shape in shapes.items())
    assert header_length(header[:8], file_bytes=places.file_bytes) == len(header)
    assert parse_header(header, file_bytes=places.file_bytes) == places
    assert places.shapes() == shapes


def test_names_are_sorted_and_data_lies_without_gaps():
    _, places = layout([TensorSpec("b", "U8", (3,)), TensorSpec("a", "F32", (2, 2))])
    assert list(places.tensors) == ["a", "b"]
    assert places.tensors["a"].start == places.header_bytes
    assert places.tensors["b"].start == places.tensors["a"].stop
    assert places.tensors["b"].stop == places.file_bytes


@pytest.mark.parametrize(
    ("entry", "data_bytes", "fault"),
    [
        ({"dtype": "F31", "shape": [1], "data_offsets": [0, 4]}, 4, "'w': unknown dtype 'F31'"),
        ({"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}, 4, "'w': shape is not a list"),
        ({"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}, 4, "'w': shape is not a list"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, 4, "4 bytes of data for F32[2], which takes 8"),
        ({"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}, 4, "bytes of data"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}, 8, "'w' starts at"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, 5, "tensors end at"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [0]}, 4, "not a pair of counts"),
        ([1], 4, "its entry is not an object"),
    ],
)
def test_a_header_that_lies_is_refused_by_name(entry, data_bytes, fault):
    header, file_bytes = header_of({"w": entry}, data_bytes=data_bytes)
    with pytest.raises(RemoteProtocolError, match=fault.replace("[", r"\[").replace("]", r"\]")):
        parse_header(header, file_bytes=file_bytes)


def test_two_tensors_cannot_share_bytes():
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    header, file_bytes = header_of({"a": entry, "b": entry}, data_bytes=4)
    with pytest.raises(RemoteProtocolError, match="starts at"):
        parse_header(header, file_bytes=file_bytes)


@pytest.mark.parametrize(
    ("prefix", "file_bytes", "fault"),
    [
        (b"abc", 3, "too few"),
        ((HEADER_BYTES_MAX + 1).to_bytes(8, "little"), 2**40, "exceeds the limit"),
        ((100).to_bytes(8, "little"), 50, "in a file of 50"),
    ],
)
def test_a_header_longer_than_its_file_is_refused_before_it_is_read(prefix, file_bytes, fault):
    with pytest.raises(RemoteProtocolError, match=fault):
        header_length(prefix, file_bytes=file_bytes)


@pytest.mark.parametrize("text", [b"[]", b"{", b'"a"', b"[" * 100_000, b"\xff"])
def test_what_is_not_an_object_is_refused(text):
    header = len(text).to_bytes(8, "little") + text
    with pytest.raises(RemoteProtocolError, match="JSON"):
        parse_header(header, file_bytes=len(header))
