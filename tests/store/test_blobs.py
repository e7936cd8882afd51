"""Artifacts match their digest or are refused; retention keeps whatever a resume needs."""

import contextlib

import pytest
from blake3 import blake3

from hypha.errors import StoreError
from hypha.store.blobs import Artifact, Blobs, Retention
from hypha.store.memory_disk import Fault, MemoryDisk, PowerLoss
from hypha.store.objects import DirectoryObjects


def artifact_of(body, kind="model", number=1):
    return Artifact(kind=kind, round=number, digest=blake3(body).hexdigest())


@pytest.fixture
def disk():
    return MemoryDisk()


@pytest.fixture
def blobs(disk):
    return Blobs(DirectoryObjects(disk))


def test_an_artifact_is_stored_under_its_digest_and_copied_out_whole(blobs, tmp_path):
    body = bytes(range(256)) * 9000
    (tmp_path / "in").write_bytes(body)
    artifact = artifact_of(body, number=12)
    blobs.put_file(artifact, tmp_path / "in")
    blobs.put_file(artifact, tmp_path / "in")
    assert blobs.artifacts("model") == [artifact]
    assert artifact.name == f"model/00000012-{artifact.digest}"
    blobs.copy_to(artifact, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == body
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_bytes_of_another_digest_are_never_stored(blobs, disk):
    with pytest.raises(StoreError, match="its bytes have blake3"):
        blobs.put(artifact_of(b"right"), [b"wrong"])
    assert blobs.artifacts("model") == []
    assert disk.listdir("model") == []


def test_decay_is_found_on_reading_and_on_storing_again(blobs, disk, tmp_path):
    artifact = artifact_of(b"body")
    blobs.put(artifact, [b"body"])
    disk.corrupt(artifact.name, 2)
    with pytest.raises(StoreError, match=artifact.digest):
        blobs.copy_to(artifact, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(StoreError, match="damaged"):
        blobs.verify(artifact)
    with pytest.raises(StoreError, match="damaged"):
        blobs.put(artifact, [b"body"])


@pytest.mark.parametrize("fault", list(Fault))
def test_a_fault_at_every_operation_leaves_artifacts_whole_or_absent(fault):
    body = b"model" * 100
    artifact = artifact_of(body)
    for at in range(9):
        disk = MemoryDisk(seed=at)
        disk.plan = {at: fault}
        stored = False
        with contextlib.suppress(PowerLoss, StoreError):
            Blobs(DirectoryObjects(disk)).put(artifact, [body[:100], body[100:]])
            stored = True
        disk.plan = {}
        disk.crash()
        blobs = Blobs(DirectoryObjects(disk))
        found = blobs.artifacts("model")
        assert found in ([artifact],) if stored else found in ([], [artifact])
        if found:
            blobs.verify(artifact)


def test_retention_keeps_the_newest_and_every_mth():
    retention = Retention(keep_last=2, keep_every=10)
    assert retention.kept([5, 10, 15, 20, 25, 30, 35]) == {10, 20, 30, 35}
    assert Retention(keep_last=1).kept([5, 10]) == {10}


def test_pruning_keeps_each_record_that_a_kept_model_needs(blobs):
    for number in range(1, 13):
        _put(blobs, "record", number)
    for number in (3, 6, 9, 12):
        _put(blobs, "model", number)
        _put(blobs, "momentum", number)
    removed = blobs.prune(Retention(keep_last=2, keep_every=6))
    assert [a.round for a in blobs.artifacts("model")] == [6, 9, 12]
    assert [a.round for a in blobs.artifacts("momentum")] == [6, 9, 12]
    assert [a.round for a in blobs.artifacts("record")] == [10, 11, 12]
    assert len(removed) == 2 + 9


def test_a_model_whose_momentum_is_missing_does_not_count_as_a_checkpoint(blobs):
    for kind, number in (("model", 1), ("momentum", 1), ("model", 2), ("record", 2)):
        _put(blobs, kind, number)
    assert blobs.prune(Retention(keep_last=1)) == []
    assert [a.round for a in blobs.artifacts("model")] == [1, 2]


def _put(blobs, kind, number):
    body = f"{kind} {number}".encode()
    blobs.put(artifact_of(body, kind, number), [body])
