"""Between a fetched file and a tensor lies no copy: executors map what they are handed, each reading for itself."""

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hypha.errors import RemoteProtocolError
from hypha.training import tensors
from hypha.training.batches import Rows
from hypha.training.tensors import Piece, Reader

STATUS = Path("/proc/self/status")
MAPS = Path("/proc/self/maps")
pytestmark = pytest.mark.skipif(not MAPS.exists(), reason="this system does not say what is mapped")
LARGE = (4096, 4096)  # 64 MiB of fp32
# What Python and torch may take meanwhile; an eighth of the tensor.
NOISE_BYTES = 8 << 20


def private_bytes() -> int:
    """Memory that is this process's own, file pages not counted."""
    (line,) = [each for each in STATUS.read_text().splitlines() if each.startswith("RssAnon:")]
    return int(line.split()[1]) << 10


def mapped_file(tensor: torch.Tensor) -> str | None:
    """The file that a tensor's first byte is mapped from."""
    address = tensor.data_ptr()
    for line in MAPS.read_text().splitlines():
        fields = line.split(maxsplit=5)
        low, high = (int(end, 16) for end in fields[0].split("-"))
        if low <= address < high:
            return fields[5] if len(fields) > 5 else None
    return None


@pytest.fixture
def large(tmp_path):
    path = tmp_path / "large.safetensors"
    tensors.save(path, {"weight": torch.randn(LARGE, generator=torch.Generator().manual_seed(0))})
    return path


def test_a_tensor_of_a_file_is_mapped_and_takes_no_memory_of_its_own(large):
    before = private_bytes()
    tensor = Reader(large).read("weight")
    assert tensors.is_finite(tensor)
    assert mapped_file(tensor) == str(large)
    assert private_bytes() - before < NOISE_BYTES


def test_a_piece_is_mapped_wherever_it_begins(large):
    piece = Piece("weight", 12_345, 23_456)
    part = Reader(large).part(piece)
    assert mapped_file(part) == str(large)
    assert torch.equal(part, load_file(large)["weight"].reshape(-1)[12_345:23_456])


def test_parameters_are_filled_from_the_map_and_no_tensor_lies_between(large):
    parameters = {"weight": torch.zeros(LARGE)}
    before = private_bytes()
    tensors.load_into(large, parameters)
    assert private_bytes() - before < NOISE_BYTES
    assert torch.equal(parameters["weight"], load_file(large)["weight"])


def test_rows_of_a_slice_are_the_map_itself(large):
    before = private_bytes()
    rows = Rows(large, {"weight": f"F32[{LARGE[1]}]"})
    batches = [rows.read(start, start + 64)["weight"] for start in range(0, LARGE[0], 64)]
    assert all(tensors.is_finite(batch) for batch in batches)
    assert {mapped_file(batch) for batch in batches} == {str(large)}
    assert private_bytes() - before < NOISE_BYTES


def test_what_is_done_to_a_tensor_changes_neither_the_file_nor_the_next_reading(large):
    file = Reader(large)
    first = file.read("weight")
    kept = first.clone()
    first.zero_()
    assert torch.equal(file.read("weight"), kept)
    assert torch.equal(load_file(large)["weight"], kept)


def test_a_tensor_outlives_its_file(large):
    kept = load_file(large)["weight"].clone()
    tensor = Reader(large).read("weight")
    large.unlink()
    assert torch.equal(tensor, kept)


@pytest.mark.parametrize("seed", range(5))
def test_mapped_tensors_are_those_that_safetensors_reads_whatever_their_places(tmp_path, seed):
    chance = random.Random(seed)
    kinds = (torch.float32, torch.uint8, torch.float16)
    made = {}
    for number in range(12):
        shape = [chance.randrange(0, 40) for _ in range(chance.randrange(1, 3))]
        made[f"t{number}"] = torch.randint(0, 100, shape).to(chance.choice(kinds))
    path = tmp_path / "mixed.safetensors"
    save_file(made, path)
    file = Reader(path)
    for name, tensor in made.items():
        placed = file.layout.tensors[name]
        data = file.raw(name, 0, placed.stop - placed.start)
        assert torch.equal(data.view(tensor.dtype).reshape(tensor.shape), tensor), name


def test_bytes_that_lie_badly_are_copied_to_where_numbers_may_lie(tmp_path):
    path = tmp_path / "odd.safetensors"
    # Not canonical: fp32 behind three bytes.
    header = (
        b'{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},"b":{"dtype":"F32","shape":[2],"data_offsets":[3,11]}}'
    )
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"abc" + torch.tensor([1.5, -2.0]).numpy().tobytes())
    assert Reader(path).layout.tensors["b"].start % 4
    found = Reader(path).read("b")
    assert found.tolist() == [1.5, -2.0]
    assert found.data_ptr() % 4 == 0


def test_a_file_cut_short_after_its_header_was_read_is_named(large):
    file = Reader(large)
    large.write_bytes(large.read_bytes()[:1000])
    with pytest.raises(RemoteProtocolError, match=r"large\.safetensors: tensor 'weight' is cut short"):
        file.read("weight")
