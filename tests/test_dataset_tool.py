"""The same text makes the same dataset; the dataset holds the text, each piece once; nothing half-made is left."""

import os
from hashlib import sha256

import numpy as np
import pytest
from blake3 import blake3
from safetensors.numpy import load_file

from hypha.dataset import open_dataset
from hypha.dataset_text import Document, split_held_out
from hypha.dataset_tool import prepare, verify
from hypha.errors import ConfigError, StoreError


def write_text(folder, documents=40, lines=60):
    for number in range(documents):
        path = folder / f"part-{number % 3}" / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{number}:{line} größer\n" for line in range(lines)), encoding="utf-8")
    return folder


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path / "text")


def rows(directory, split):
    slices = [s for s in open_dataset(directory).manifest.slices if s.split == split]
    return np.concatenate([load_file(directory / s.name)["input_ids"] for s in slices])


def made(sources, out, **options):
    return prepare(sources, out, **{"name": "text", "sequence_length": 32, "slice_bytes": 4096, **options})


def test_the_same_text_gives_the_same_bytes_wherever_it_lies(text, tmp_path):
    made([text], tmp_path / "a")
    made([write_text(tmp_path / "elsewhere" / "moved")], tmp_path / "b")
    assert (tmp_path / "a/dataset.toml").read_bytes() == (tmp_path / "b/dataset.toml").read_bytes()
    assert verify(tmp_path / "a") == verify(tmp_path / "b") == []
    made([text], tmp_path / "c", seed=1)
    assert (tmp_path / "a/dataset.toml").read_bytes() != (tmp_path / "c/dataset.toml").read_bytes()


def test_these_rows_are_pinned_so_that_no_version_of_numpy_changes_a_dataset(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a").write_text("".join(chr(97 + n % 26) for n in range(400)))
    manifest = made([tmp_path / "text"], tmp_path / "out", sequence_length=8, held_out=0.2, digest="sha256")
    assert [s.digest[:16] for s in manifest.slices] == ["63de1e60c0ae69d5", "7588ee22f58069a4"]


def test_every_row_is_a_stretch_of_the_text_and_none_is_lost_or_doubled(text, tmp_path):
    manifest = made([text], tmp_path / "out")
    found = {split: rows(tmp_path / "out", split) for split in ("train", "held-out")}
    whole = sorted(path.read_bytes() for path in text.rglob("*.txt"))
    total = sum(map(len, whole)) + len(whole)
    assert total - 2 * 32 < sum(len(r) * 32 for r in found.values()) <= total
    everything = [bytes(row) for r in found.values() for row in r]
    assert len(set(everything)) == len(everything)
    joined = b"\x00".join(whole)
    inside = [row for row in everything if b"\x00" not in row]
    assert len(inside) > len(everything) / 2
    assert all(row in joined for row in inside)
    assert manifest.vocabulary == 256
    assert manifest.schema == {"input_ids": "U8[32]"}


def test_held_out_text_comes_from_files_of_its_own(text, tmp_path):
    made([text], tmp_path / "out", held_out=0.1)
    files = [path.read_bytes() for path in text.rglob("*.txt")]

    def sources(split):
        found = [bytes(row) for row in rows(tmp_path / "out", split)]
        return {n for n in range(40) if any(f"\n{n}:".encode() in row for row in found)}

    assert len(files) == 40
    assert sources("train") & sources("held-out") == set()
    assert 3 <= len(sources("held-out")) <= 6


def test_slices_mix_all_of_the_text(text, tmp_path):
    manifest = made([text], tmp_path / "out")
    train = [s for s in manifest.slices if s.split == "train"]
    assert len(train) >= 5
    for one in train:
        inside = [bytes(row) for row in load_file(tmp_path / "out" / one.name)["input_ids"]]
        assert len({n for n in range(40) if any(f"\n{n}:".encode() in row for row in inside)}) > 20
        assert 0.5 * 4096 < one.bytes < 1.5 * 4096


def test_binary_unreadable_and_foreign_files_are_skipped_with_a_warning(text, tmp_path, caplog):
    made([text], tmp_path / "without")
    (text / "binary").write_bytes(b"abc\x00def" * 100)
    (text / "latin").write_bytes(b"caf\xe9 " * 100)
    (text / "cut").write_bytes("größer".encode()[:-3])
    (text / "empty").write_bytes(b"")
    os.mkfifo(text / "pipe")
    (text / "__pycache__").mkdir()
    (text / "__pycache__" / "x.py").write_text("ignored")
    (text / ".git").mkdir()
    (text / ".git" / "config").write_text("ignored")
    made([text], tmp_path / "with")
    said = [record.getMessage() for record in caplog.records]
    for name, why in (("binary", "binary"), ("latin", "not UTF-8"), ("cut", "not UTF-8"), ("pipe", "not a regular")):
        assert any(f"{name}: {why}" in line for line in said)
    assert len(said) == 4
    assert (tmp_path / "with/dataset.toml").read_bytes() == (tmp_path / "without/dataset.toml").read_bytes()


def test_one_large_file_is_split_at_its_end(tmp_path):
    (tmp_path / "book.txt").write_text("".join(f"line {n}\n" for n in range(4000)))
    manifest = made([tmp_path / "book.txt"], tmp_path / "out", held_out=0.1)
    held = b"".join(bytes(row) for row in rows(tmp_path / "out", "held-out"))
    assert b"\nline 3990\n" in held
    assert b"line 10\n" not in held
    assert 0.05 < sum(s.samples for s in manifest.held_out) / sum(s.samples for s in manifest.slices) < 0.15


def test_a_file_named_twice_counts_once(text, tmp_path):
    made([text], tmp_path / "once")
    made([text, text, next(text.rglob("*.txt"))], tmp_path / "twice")
    assert (tmp_path / "once/dataset.toml").read_bytes() == (tmp_path / "twice/dataset.toml").read_bytes()


def test_a_limit_takes_a_deterministic_part_of_the_text(text, tmp_path):
    manifest = made([text], tmp_path / "a", max_bytes=20_000)
    assert 19_000 < sum(s.samples for s in manifest.slices) * 32 <= 20_100
    found = [bytes(row) for split in ("train", "held-out") for row in rows(tmp_path / "a", split)]
    taken = {n for n in range(40) if any(f"\n{n}:".encode() in row for row in found)}
    assert 10 < len(taken) < 30
    assert {n % 3 for n in taken} == {0, 1, 2}
    made([text], tmp_path / "b", max_bytes=20_000)
    assert (tmp_path / "a/dataset.toml").read_bytes() == (tmp_path / "b/dataset.toml").read_bytes()


def test_what_exists_is_replaced_only_by_force_and_only_if_it_is_a_dataset(text, tmp_path):
    made([text], tmp_path / "out")
    with pytest.raises(ConfigError, match="exists; --force replaces it"):
        made([text], tmp_path / "out")
    made([text], tmp_path / "out", seed=5, force=True)
    assert verify(tmp_path / "out") == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "text"]
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="not a dataset"):
        made([text], tmp_path / "home", force=True)
    assert (tmp_path / "home" / "letter.txt").read_text() == "dear"


def test_a_dataset_inside_its_own_source_is_not_read_again(text, tmp_path):
    made([text], text / "out")
    first = (text / "out/dataset.toml").read_bytes()
    made([text], text / "out", force=True)
    assert (text / "out/dataset.toml").read_bytes() == first


def test_a_failure_leaves_nothing_behind_and_keeps_what_was_there(text, tmp_path, monkeypatch):
    made([text], tmp_path / "out")
    before = sorted(path.name for path in tmp_path.iterdir())

    def broken(_scratch, _out):
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr("hypha.dataset_tool._put_in_place", broken)
    with pytest.raises(StoreError, match="somewhere: No space left"):
        made([text], tmp_path / "out", force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert verify(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"digest": "md5"}, "digest 'md5' is not one of blake3, sha256"),
        ({"seed": -1}, "seed -1 is negative"),
        ({"sequence_length": 100_000}, "too few"),
        ({"tokenizer": "missing.json"}, "no such tokenizer file"),
    ],
)
def test_what_cannot_be_made_is_refused_by_name(text, tmp_path, options, fault):
    if "tokenizer" in options:
        options = {"tokenizer": tmp_path / options["tokenizer"]}
    with pytest.raises(ConfigError, match=fault):
        made([text], tmp_path / "out", **options)
    with pytest.raises(ConfigError, match="nowhere: no such file"):
        made([tmp_path / "nowhere"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "algorithm", "digest_of"),
    [({}, "blake3", blake3), ({"digest": "blake3"}, "blake3", blake3), ({"digest": "sha256"}, "sha256", sha256)],
)
def test_digests_are_those_of_the_slices_and_verified(text, tmp_path, options, algorithm, digest_of):
    manifest = made([text], tmp_path / "out", **options)
    assert manifest.digest_algorithm == algorithm
    for entry in manifest.slices:
        assert entry.digest == digest_of((tmp_path / "out" / entry.name).read_bytes()).hexdigest()
    assert verify(tmp_path / "out") == []


def test_a_tokenizer_makes_token_ids_that_decode_to_the_text(text, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<|endoftext|>": 0, "[UNK]": 1, **{f"{n}": n + 2 for n in range(60)}, ":": 62, "größer": 63}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.save(str(tmp_path / "tokenizer.json"))
    manifest = made([text], tmp_path / "out", tokenizer=tmp_path / "tokenizer.json", slice_bytes=2048)
    assert manifest.schema == {"input_ids": "U16[32]"}
    assert manifest.vocabulary == 64
    assert verify(tmp_path / "out") == []
    ids = rows(tmp_path / "out", "train")
    assert ids.dtype == np.dtype("<u2")
    assert set(np.unique(ids)) <= {0, *range(2, 64)}
    assert 20 < (ids == 0).sum() <= 40


def test_the_split_takes_the_share_by_whole_documents(tmp_path):
    documents = [Document(str(n), tmp_path, 0, 100 + n) for n in range(100)]
    train, held = split_held_out(documents, share=0.05, seed=0, bytes_min=10)
    assert sorted([*train, *held], key=lambda d: int(d.key)) == documents
    assert 0.05 <= sum(d.size for d in held) / sum(d.size for d in documents) <= 0.075
    assert split_held_out(documents, share=0.05, seed=1, bytes_min=10)[1] != held
    assert split_held_out(documents, share=0, seed=0, bytes_min=10)[1] == []


def test_a_giant_among_small_files_is_not_held_out_whole(tmp_path):
    documents = [Document("giant", tmp_path, 0, 100_000), Document("small", tmp_path, 0, 10)]
    train, held = split_held_out(documents, share=0.05, seed=0, bytes_min=10)
    assert held == [Document("giant", tmp_path, 100_000 - 5000, 100_000)]
    assert sorted(d.size for d in train) == [10, 95_000]
