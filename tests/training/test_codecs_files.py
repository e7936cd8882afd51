"""Coded files: written and read piece by piece, and headers that lie."""

import json
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hypha.errors import RemoteProtocolError
from hypha.protocol.compression import CODECS, Coding
from hypha.training import codecs, tensors
from hypha.training.coded import CodedReader, CodedWriter, screen

SHAPES = {"layers.1": (33, 130), "layers": (3,), "layers.10.bias": (), "nothing": (0, 4)}
LOSSY = [codec for codec in CODECS if codec != "none"]


def values_of(shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.01 for name, shape in shapes.items()}


def write(path, values, coding):
    """Return what the writer said readers will find, by tensor."""
    shapes = tensors.shapes_of(values)
    found = {name: [torch.empty(0)] for name in shapes}
    with CodedWriter(path, shapes, coding) as file:
        for piece in tensors.pieces_of(shapes):
            found[piece.name].append(file.append(piece, piece.of(values[piece.name])))
        file.finish()
    return {name: torch.cat(parts) for name, parts in found.items()}


def read(path, shapes, coding):
    file = CodedReader(path, shapes, coding)
    found = {name: [torch.empty(0)] for name in shapes}
    for piece in tensors.pieces_of(shapes):
        found[piece.name].append(file.part(piece))
    return {name: torch.cat(parts) for name, parts in found.items()}


def rewritten(path, change):
    """The same file with its header's entries changed."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    change(entries)
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    return path


@pytest.mark.parametrize("codec", CODECS)
def test_readers_find_what_the_writer_said(tmp_path, codec):
    coding = Coding(codec=codec)
    said = write(tmp_path / "update", values_of(), coding)
    found = read(tmp_path / "update", SHAPES, coding)
    assert all(torch.equal(found[name], said[name]) for name in SHAPES)
    assert screen(tmp_path / "update", SHAPES, coding) is None


@pytest.mark.parametrize("codec", CODECS)
def test_tensors_of_many_pieces_code_as_whole_ones_do(tmp_path, codec):
    coding, shapes = Coding(codec=codec), {"large": (tensors.PIECE_ELEMENTS * 2 + 4096 + 77,)}
    values = values_of(shapes)
    said = write(tmp_path / "update", values, coding)
    whole = codecs.decode(codecs.encode(values["large"], coding), values["large"].numel(), coding)
    assert torch.equal(said["large"], whole)
    assert torch.equal(read(tmp_path / "update", shapes, coding)["large"], whole)


def test_none_is_the_plain_file_to_the_last_bit(tmp_path):
    write(tmp_path / "coded", values_of(), Coding(codec="none"))
    tensors.save(tmp_path / "plain", values_of())
    assert (tmp_path / "coded").read_bytes() == (tmp_path / "plain").read_bytes()


@pytest.mark.parametrize("codec", LOSSY)
def test_the_file_is_canonical_and_names_its_codec(tmp_path, codec):
    write(tmp_path / "update", values_of(), Coding(codec=codec))
    layout = tensors.layout_of(tmp_path / "update")
    assert list(layout.tensors) == sorted(f"{codec}:{name}" for name in SHAPES)


@pytest.mark.parametrize(
    ("codec", "bits"), [("fp16", 16), ("bf16", 16), ("int8", 8.25), ("int4", 4.25), ("topk", 8 * 152 / 4096)]
)
def test_bits_per_element(codec, bits):
    elements = 1 << 20
    assert Coding(codec=codec, density=0.02).bytes_of(elements) * 8 / elements == bits


@pytest.mark.parametrize("codec", CODECS)
def test_another_codec_than_the_jobs_is_refused_by_name(tmp_path, codec):
    other = "int8" if codec != "int8" else "int4"
    write(tmp_path / "update", values_of(), Coding(codec=codec))
    refusal = screen(tmp_path / "update", SHAPES, Coding(codec=other))
    assert refusal is not None
    assert refusal.endswith(
        f"tensor 'layers' is coded {codec!r}, expected {other!r}"
        if codec != "none"
        else "tensor 'int8:layers' is missing (4 in all)"
    )


def test_an_unknown_codec_is_refused_by_name(tmp_path):
    write(tmp_path / "update", values_of(), Coding(codec="int8"))

    def rename(entries):
        entries["int3:layers.1"] = entries.pop("int8:layers.1")

    refusal = screen(rewritten(tmp_path / "update", rename), SHAPES, Coding(codec="int8"))
    assert refusal == "update: tensor 'layers.1' is coded 'int3', expected 'int8'"


def test_another_density_is_refused_by_its_size(tmp_path):
    write(tmp_path / "update", values_of(), Coding(codec="topk", density=0.03))
    refusal = screen(tmp_path / "update", SHAPES, Coding(codec="topk", density=0.01))
    assert refusal is not None
    assert "'topk:layers.1' is U8[" in refusal


def test_a_bad_scale_in_the_middle_of_a_file_is_refused_with_its_tensor(tmp_path):
    coding = Coding(codec="int4")
    write(tmp_path / "update", values_of(), coding)
    at = tensors.layout_of(tmp_path / "update").tensors["int4:layers.1"].start + 5 * coding.row_bytes(128)
    data = bytearray((tmp_path / "update").read_bytes())
    data[at : at + 4] = b"\x00\x00\xc0\x7f"
    (tmp_path / "update").write_bytes(data)
    refusal = screen(tmp_path / "update", SHAPES, coding)
    assert refusal == f"update: tensor 'layers.1': a scale is negative, not finite or above {codecs.MAGNITUDE_MAX:g}"
    with pytest.raises(RemoteProtocolError, match=r"tensor 'layers\.1': a scale"):
        read(tmp_path / "update", SHAPES, coding)


def test_plain_elements_that_are_not_finite_are_refused(tmp_path):
    values = values_of()
    values["layers"][1] = math.nan
    tensors.save(tmp_path / "update", values)
    assert screen(tmp_path / "update", SHAPES, Coding()) == "tensor 'layers' is not finite"


def test_what_cannot_be_coded_leaves_no_file(tmp_path):
    values = values_of()
    values["layers"][1] = math.inf
    with pytest.raises(RemoteProtocolError, match="not finite, or too large"):
        write(tmp_path / "update", values, Coding(codec="int8"))
    assert list(tmp_path.iterdir()) == []


counts = st.integers(-1, 2**64)
lies = st.one_of(
    st.tuples(st.just("dtype"), st.sampled_from(["U8", "I8", "F32", "F64", "BOOL", "U4", "", 3, None])),
    st.tuples(st.just("shape"), st.lists(counts, max_size=4) | st.just("17") | st.just([[1]])),
    st.tuples(st.just("data_offsets"), st.lists(counts, max_size=3) | st.just({})),
)


@given(
    st.sampled_from(CODECS),
    st.sampled_from(sorted(SHAPES)),
    st.lists(lies, min_size=1, max_size=3),
    st.binary(max_size=64),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_header_that_lies_is_refused_and_its_bytes_are_never_read(tmp_path, codec, name, changes, tail):
    coding, path = Coding(codec=codec), tmp_path / "update"
    write(path, values_of(), coding)
    honest = tensors.layout_of(path)

    def lie(entries):
        for key, value in changes:
            entries[coding.name(name)][key] = value

    rewritten(path, lie).write_bytes(path.read_bytes() + tail)
    try:
        found = tensors.layout_of(path)
    except RemoteProtocolError:
        assert screen(path, SHAPES, coding) is not None
        return
    same = {n: p.spec for n, p in found.tensors.items()} == {n: p.spec for n, p in honest.tensors.items()}
    assert (screen(path, SHAPES, coding) is None) == same


@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=8),
        lambda one: st.lists(one) | st.dictionaries(st.text(max_size=8), one),
    )
)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_header_of_any_json_is_refused(tmp_path, tree):
    text = json.dumps(tree).encode()
    (tmp_path / "update").write_bytes(len(text).to_bytes(8, "little") + text)
    assert screen(tmp_path / "update", SHAPES, Coding(codec="topk")) is not None
