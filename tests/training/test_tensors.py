"""Files of tensors: digests, whole or not at all, and what screening refuses by name."""

import resource

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file

from hypha.errors import RemoteProtocolError, StoreError
from hypha.training import tensors

SHAPES = {"a": (2, 3), "b": (), "c": (0, 4)}


def some(value=1.5):
    return {name: torch.full(shape, value) for name, shape in SHAPES.items()}


def test_a_saved_file_is_read_by_the_reference_implementation(tmp_path):
    written = tensors.save(tmp_path / "m.safetensors", some())
    loaded = load_file(written.path)
    assert {name: tuple(tensor.shape) for name, tensor in loaded.items()} == SHAPES
    assert torch.equal(loaded["a"], some()["a"])


def test_the_digest_is_that_of_the_files_bytes_and_of_the_tensors(tmp_path):
    written = tensors.save(tmp_path / "m.safetensors", some())
    data = written.path.read_bytes()
    assert (written.bytes, written.digest) == (len(data), blake3(data).hexdigest())
    assert tensors.digest(some()) == written.digest
    assert tensors.digest(some(2.0)) != written.digest


def test_pieces_of_a_large_tensor_are_the_tensor(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "PIECE_ELEMENTS", 4)
    values = {"a": torch.arange(30.0).reshape(5, 6), "b": torch.arange(3.0)}
    file = tensors.Reader(tensors.save(tmp_path / "m", values).path)
    pieces = list(file.pieces())
    assert [(piece.start, piece.stop) for piece in pieces if piece.name == "a"][-2:] == [(24, 28), (28, 30)]
    assert torch.equal(
        torch.cat([file.part(piece) for piece in pieces]), torch.cat([values["a"].flatten(), values["b"]])
    )
    assert all(torch.equal(file.part(piece), piece.of(values[piece.name])) for piece in pieces)


def test_half_precision_is_stored_as_fp32(tmp_path):
    written = tensors.save(tmp_path / "m.safetensors", {"a": torch.full((3,), 0.5, dtype=torch.bfloat16)})
    assert torch.equal(tensors.Reader(written.path).read("a"), torch.full((3,), 0.5))


def test_an_interrupted_writer_leaves_nothing(tmp_path):
    with tensors.Writer(tmp_path / "m.safetensors", SHAPES) as out:
        out.append(torch.zeros(2, 3))
        assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_not_there_is_named(tmp_path):
    with pytest.raises(StoreError, match=r"nowhere/m\.safetensors"):
        tensors.save(tmp_path / "nowhere" / "m.safetensors", some())


@pytest.fixture
def disk_of_one_mebibyte():
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_is_full_is_named_and_nothing_is_left(tmp_path, disk_of_one_mebibyte):
    shapes = dict.fromkeys("abcdefgh", (1 << 16,))  # two MiB, of which the thread behind writes one
    with pytest.raises(StoreError, match=r"m\.safetensors: File too large"):
        tensors.save(tmp_path / "m.safetensors", {name: torch.ones(shape) for name, shape in shapes.items()})
    assert [path.name for path in tmp_path.iterdir()] == []


def test_loading_into_other_shapes_changes_nothing(tmp_path):
    written = tensors.save(tmp_path / "m.safetensors", some())
    mine = {"a": torch.zeros(2, 2), "b": torch.zeros(()), "c": torch.zeros(0, 4)}
    with pytest.raises(RemoteProtocolError, match=r"'a' is F32\[2, 3\], expected F32\[2, 2\]"):
        tensors.load_into(written.path, mine)
    assert torch.equal(mine["b"], torch.zeros(()))


def test_a_sound_update_passes(tmp_path):
    assert tensors.screen(tensors.save(tmp_path / "u", some()).path, SHAPES) is None


def test_large_finite_values_whose_sum_overflows_pass(tmp_path):
    large = {**some(), "a": torch.full((2, 3), 3e38)}
    assert tensors.screen(tensors.save(tmp_path / "u", large).path, SHAPES) is None


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_an_update_that_is_not_finite_is_refused_by_name(tmp_path, poison):
    poisoned = some()
    poisoned["a"][1, 2] = poison
    assert tensors.screen(tensors.save(tmp_path / "u", poisoned).path, SHAPES) == "tensor 'a' is not finite"


def test_infinities_that_cancel_are_found(tmp_path):
    poisoned = some()
    poisoned["a"][0, 0], poisoned["a"][1, 1] = float("inf"), -float("inf")
    assert tensors.screen(tensors.save(tmp_path / "u", poisoned).path, SHAPES) == "tensor 'a' is not finite"


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        (lambda t: t.pop("a"), "tensor 'a' is missing (1 in all)"),
        (lambda t: t.update(z=torch.zeros(1)), "tensor 'z' is not of this model (1 in all)"),
        (lambda t: t.update(a=torch.zeros(3, 2)), "tensor 'a' is F32[3, 2], expected F32[2, 3]"),
        (lambda t: t.update(a=torch.zeros(2, 3, dtype=torch.float16)), "tensor 'a' is F16[2, 3], expected F32[2, 3]"),
    ],
)
def test_an_update_of_other_tensors_is_refused_by_name(tmp_path, change, refusal):
    changed = some()
    change(changed)
    save_file(changed, tmp_path / "u")
    assert tensors.screen(tmp_path / "u", SHAPES) == refusal


def test_a_truncated_update_is_refused(tmp_path):
    written = tensors.save(tmp_path / "u", some())
    written.path.write_bytes(written.path.read_bytes()[:-3])
    assert "tensors end at" in tensors.screen(written.path, SHAPES)


def test_garbage_is_refused(tmp_path):
    (tmp_path / "u").write_bytes(b"\x10\0\0\0\0\0\0\0" + b"garbage garbage!")
    assert "header is not JSON" in tensors.screen(tmp_path / "u", SHAPES)
