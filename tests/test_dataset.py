"""The manifest is the only thing believed about a dataset, and it is checked to the last key."""

import hashlib

import msgspec
import pytest
from safetensors.numpy import load_file

from hypha.dataset import (
    MANIFEST_NAME,
    Manifest,
    SliceEntry,
    digest_of_manifest,
    faults_of,
    open_dataset,
    parse_manifest,
    parse_tensor,
    render_manifest,
)
from hypha.dataset_tool import prepare
from hypha.errors import ConfigError, RemoteProtocolError

DIGEST = "ab" * 32


def entry(name="train-00000.safetensors", split="train"):
    return SliceEntry(name=name, split=split, samples=3, bytes=1000, digest=DIGEST)


def manifest(*entries, schema=None):
    return Manifest(name="text", schema={"input_ids": "U8[128]"} if schema is None else schema, slices=entries)


@pytest.fixture
def dataset(tmp_path):
    (tmp_path / "text").mkdir()
    for number in range(20):
        (tmp_path / "text" / f"{number}.txt").write_text(f"document {number}\n" * 50)
    prepare([tmp_path / "text"], tmp_path / "out", name="text", sequence_length=16, slice_bytes=4096)
    return tmp_path / "out"


def test_a_manifest_survives_its_own_rendering():
    before = manifest(
        entry(), entry("held-out-00000.safetensors", "held-out"), schema={"a.b": "F32[3, 4]", "y": "I64[]"}
    )
    assert parse_manifest(render_manifest(before)) == before


def test_a_manifest_tells_what_is_trained_on_and_what_is_held_out():
    found = manifest(entry("a.safetensors"), entry("b.safetensors", "held-out"), entry("c.safetensors"))
    assert [ref.name for ref in found.train] == ["a.safetensors", "c.safetensors"]
    reference = found.reference(DIGEST)
    assert [held.name for held in reference.held_out] == ["b.safetensors"]
    assert (reference.name, reference.manifest_digest, reference.schema) == ("text", DIGEST, {"input_ids": "U8[128]"})
    assert found.entry("c.safetensors") == entry("c.safetensors")
    assert found.entry("d.safetensors") is None


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda text: text.replace('name = "text"', 'name = "../text"'), r"\$.name"),
        (lambda text: text.replace("train-00000.", "../train-00000."), r"\$.slices\[0\].name"),
        (lambda text: text.replace("train-00000.safetensors", "/etc/passwd"), r"\$.slices\[0\].name"),
        (lambda text: text.replace("train-00000.", "train/00000."), r"\$.slices\[0\].name"),
        (lambda text: text.replace("train-00000.safetensors", r"a.safetensors\n"), r"\$.slices\[0\].name"),
        (lambda text: text.replace("samples = 3", "samples = -3"), r"\$.slices\[0\].samples"),
        (lambda text: text.replace("abab", "ABAB"), r"\$.slices\[0\].digest"),
        (lambda text: text.replace('"sha256"', '"md5"'), r"\$.digest_algorithm"),
        (lambda text: text.replace("U8[128]", "U7[128]"), "schema.input_ids: 'U7\\[128\\]'"),
        (lambda text: text.replace("U8[128]", "U8[128]; rm"), "schema.input_ids"),
        (lambda text: text.replace("split", "splitt"), "unknown field `splitt`"),
        (lambda text: text + text[text.index("[[slices]]") :], "named twice"),
        (lambda text: text.replace("[schema]", "[schema"), "dataset.toml"),
        (lambda text: text.replace("format = 1", "format = 2"), "format"),
    ],
)
def test_what_is_wrong_with_a_manifest_is_named(change, fault):
    text = render_manifest(manifest(entry())).decode()
    assert parse_manifest(text.encode()) == manifest(entry())
    assert change(text) != text
    with pytest.raises(RemoteProtocolError, match=fault):
        parse_manifest(change(text).encode())


def test_more_held_out_slices_than_a_job_can_name_are_refused():
    entries = tuple(entry(f"{n}.safetensors", "held-out") for n in range(65))
    with pytest.raises(ValueError, match="65 held-out slices exceed the limit of 64"):
        manifest(*entries)


def test_a_tensor_of_a_schema_has_a_dtype_and_a_shape():
    assert str(parse_tensor("x", "F32[3, 4]")) == "F32[3, 4]"
    assert parse_tensor("x", "I64[]").shape == ()


def test_a_sound_dataset_opens_and_has_no_faults(dataset):
    opened = open_dataset(dataset)
    assert opened.digest == hashlib.sha256((dataset / MANIFEST_NAME).read_bytes()).hexdigest()
    assert digest_of_manifest(opened.manifest_bytes) == opened.digest
    assert faults_of(dataset) == []
    first = opened.manifest.slices[0]
    assert load_file(dataset / first.name)["input_ids"].shape == (first.samples, 16)


def test_a_missing_or_resized_slice_does_not_open(dataset):
    name = open_dataset(dataset).manifest.slices[0].name
    data = (dataset / name).read_bytes()
    (dataset / name).write_bytes(data[:-1])
    with pytest.raises(ConfigError, match=rf"{name}: {len(data) - 1} bytes where the manifest says {len(data)}"):
        open_dataset(dataset)
    (dataset / name).unlink()
    with pytest.raises(ConfigError, match=f"{name}: No such file"):
        open_dataset(dataset)
    assert faults_of(dataset) == [f"{name}: No such file or directory"]


def test_a_directory_that_is_no_dataset_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"dataset.toml: No such file.*not a dataset"):
        open_dataset(tmp_path)
    assert faults_of(tmp_path) == ["dataset.toml: No such file or directory"]
    (tmp_path / MANIFEST_NAME).write_text("nonsense")
    with pytest.raises(ConfigError, match=r"dataset\.toml"):
        open_dataset(tmp_path)


def test_every_fault_is_found_and_names_its_file(dataset):
    first, *rest = open_dataset(dataset).manifest.slices
    data = bytearray((dataset / first.name).read_bytes())
    data[-1] ^= 1
    (dataset / first.name).write_bytes(data)
    (dataset / "stray.txt").write_text("x")
    found = faults_of(dataset)
    assert [fault.split(":")[0] for fault in found] == [first.name, "stray.txt"]
    assert first.digest in found[0]
    assert rest


def test_a_slice_with_the_wrong_tensors_is_a_fault(dataset):
    opened = open_dataset(dataset)
    for schema, fault in (
        ({"input_ids": "U8[17]"}, "tensor 'input_ids' is U8"),
        ({"input_ids": "I8[16]"}, "tensor 'input_ids' is U8"),
        ({"input_ids": "U8[16]", "labels": "U8[16]"}, "tensor 'labels' is missing"),
        ({"pixels": "U8[16]"}, "tensor 'input_ids' is not in the schema"),
    ):
        changed = msgspec.structs.replace(opened.manifest, schema=schema)
        (dataset / MANIFEST_NAME).write_bytes(render_manifest(changed))
        assert fault in faults_of(dataset)[0]


def test_a_slice_that_is_no_safetensors_is_a_fault(dataset):
    opened = open_dataset(dataset)
    first = opened.manifest.slices[0]
    junk = b"\xff" * first.bytes
    (dataset / first.name).write_bytes(junk)
    assert "header" in faults_of(dataset)[0]
