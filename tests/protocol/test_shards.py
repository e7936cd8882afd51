"""How a model is shared: every tensor in one shard, evenly by bytes, the same on every machine."""

from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypha.errors import LocalProtocolError
from hypha.protocol.closing import whole_merged
from hypha.protocol.messages import Merged
from hypha.protocol.shards import SHARDS_MAX, kind_of, part_of, split, whole_digest

NAMES = st.text("abc.", min_size=1, max_size=6)
SIZES = st.dictionaries(NAMES, st.integers(min_value=0, max_value=1 << 30), min_size=1, max_size=40)


@given(sizes=SIZES, shards=st.integers(1, SHARDS_MAX))
def test_every_tensor_is_in_one_shard_and_no_shard_is_empty(sizes, shards):
    if shards > len(sizes):
        with pytest.raises(LocalProtocolError, match=rf"parameter_servers = {shards}, but the model has only"):
            split(sizes, shards)
        return
    groups = split(sizes, shards)
    assert sorted(name for group in groups for name in group) == sorted(sizes)
    assert all(groups)
    assert all(list(group) == sorted(group) for group in groups)


@given(sizes=SIZES, shards=st.integers(1, 4), order=st.randoms())
def test_shards_differ_by_one_tensor_at_most_and_do_not_depend_on_the_order_of_names(sizes, shards, order):
    if shards > len(sizes):
        return
    filled = [sum(sizes[name] for name in group) for group in split(sizes, shards)]
    assert max(filled) - min(filled) <= max(sizes.values())
    shuffled = list(sizes.items())
    order.shuffle(shuffled)
    assert split(dict(shuffled), shards) == split(sizes, shards)


def test_the_largest_go_first_and_ties_go_by_name():
    sizes = {"a": 4, "b": 4, "c": 10, "d": 1, "e": 1}
    assert split(sizes, 2) == (("c",), ("a", "b", "d", "e"))
    assert split({"a": 1, "b": 1, "c": 1}, 2) == (("a", "c"), ("b",))


def test_each_fragment_is_shared_evenly():
    layers = {f"layers.{n}.w": 8 for n in range(4)} | {f"layers.{n}.b": 2 for n in range(4)}
    fragments = [{name for name in layers if int(name[7]) % 2 == turn} for turn in (0, 1)]
    groups = split(layers, 2, fragments)
    for fragment in fragments:
        assert [sum(layers[name] for name in group if name in fragment) for group in groups] == [10, 10]


def test_more_servers_than_are_possible_are_refused():
    for shards in (0, SHARDS_MAX + 1):
        with pytest.raises(LocalProtocolError, match=f"{shards} parameter servers; 1 to {SHARDS_MAX} are possible"):
            split({"a": 1}, shards)


def test_the_whole_of_one_part_is_that_part():
    assert whole_digest(["d"], sha256) == "d"
    assert whole_digest(["d", "e"], sha256) == sha256(b"d\ne").hexdigest() != whole_digest(["e", "d"], sha256)
    assert [part_of("d", (), 0), part_of("d", (), 1)] == ["d", None]
    assert [part_of("w", ("d", "e"), shard) for shard in range(3)] == ["d", "e", None]
    assert [kind_of("model", shard) for shard in range(2)] == ["model", "model-1"]


def test_the_outcome_of_the_whole_is_made_of_the_shards():
    def merged(letter, norm):
        digests = {f"{part}_digest": letter * 64 for part in ("base", "model", "momentum", "record", "update")}
        sizes = {f"{part}_bytes": 3 for part in ("model", "momentum", "record", "update")}
        return Merged(round=2, close=7, update_norm=norm, **digests, **sizes)

    one, two = merged("1", 3.0), merged("2", 4.0)
    assert whole_merged([one], sha256) is one
    whole = whole_merged([one, two], sha256)
    assert (whole.round, whole.close, whole.update_bytes, whole.update_norm) == (2, 7, 6, 5.0)
    assert whole.model_digest == whole_digest(["1" * 64, "2" * 64], sha256)
