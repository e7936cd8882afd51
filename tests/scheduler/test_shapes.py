"""A checkpoint of another model is refused with the shapes that differ."""

import pytest
from blake3 import blake3

from hypha.errors import ConfigError
from hypha.protocol.job import ModelSpec, Rounds
from hypha.protocol.tensorfile import TensorSpec, layout
from hypha.scheduler.config import DatasetConfig, JobConfig
from hypha.scheduler.place import insist_same_job
from hypha.scheduler.settings import settings_of
from hypha.scheduler.shapes import configured_shapes, differing_shapes, say_difference, stored_shapes
from hypha.scheduler.store import open_store
from hypha.store.blobs import Artifact, Blobs
from hypha.store.memory_disk import MemoryDisk
from hypha.store.objects import DirectoryObjects

NARROW, WIDE = ({"layers": [["linear", 8, width], ["relu"], ["linear", width, 4]]} for width in (16, 32))


def job(config, **changes):
    return JobConfig(
        model=ModelSpec(type="torch", config=config),
        rounds=Rounds(updates=1, samples_between_updates=1),
        **({"dataset": "text"} | changes),
    )


def put_model(objects, shapes, number=0):
    header, placed = layout(TensorSpec(name, "F32", shape) for name, shape in shapes.items())
    body = header + bytes(placed.file_bytes - len(header))
    artifact = Artifact(kind="model", round=number, digest=blake3(body).hexdigest())
    Blobs(objects).put(artifact, [body])
    return artifact


@pytest.fixture
def disk():
    return MemoryDisk()


@pytest.fixture
def objects(disk):
    return DirectoryObjects(disk)


def test_the_first_tensors_that_differ_are_named_and_the_rest_counted():
    there = {"a": (2, 3), "b": (1,), "c": (4,), "d": (5,), "same": (7,)}
    here = {"a": (2, 4), "c": (3,), "d": (6,), "same": (7,), "z": (1,)}
    said = say_difference(there, here)
    assert said.startswith("tensor a is [2, 3] there, is [2, 4] here, tensor b is [1] there, is missing here, ")
    assert said.endswith("2 more differ")
    assert say_difference(there, there) == ""


def test_shapes_come_from_the_newest_models_header_however_long_it_is(objects):
    assert stored_shapes(objects) is None
    many = {f"tensor-{number:06d}": (number, 2) for number in range(15_000)}  # a header of more than one piece
    put_model(objects, {"old": (1,)}, number=3)
    put_model(objects, many, number=4)
    assert stored_shapes(objects) == many


def test_a_model_that_cannot_be_read_tells_no_shapes(objects, disk):
    artifact = put_model(objects, {"a": (2, 3)})
    disk.corrupt(artifact.name, 0)
    assert stored_shapes(objects) is None
    assert differing_shapes(objects, ModelSpec(type="torch", config=NARROW)) == ""


@pytest.mark.slow
def test_a_checkpoint_of_another_model_is_refused_with_its_shapes_and_stays(disk, objects):
    narrow = job(NARROW)
    shapes = configured_shapes(narrow.model)
    assert shapes["layers.0.weight"] == (16, 8)
    settings = settings_of(narrow, manifest_digest="d" * 64)
    with open_store(disk, objects, job_id="job-1", settings=settings, slices=()) as store:
        put_model(objects, shapes)
        store.begin_epoch(scheduler="s", nonce="n")
    before = {name: objects.read(name) for kind in ("chain", "model") for name in objects.names(kind)}

    insist_same_job(objects, narrow)
    with pytest.raises(ConfigError) as refused:
        insist_same_job(objects, job(WIDE))
    said = str(refused.value)
    assert "scheduler.job.model.config.layers was [['linear', 8, 16], ['relu'], ['linear', 16, 4]], is [[" in said
    assert "tensor layers.0.bias is [16] there, is [32] here" in said
    assert "--fresh" in said
    with pytest.raises(ConfigError, match=r"scheduler\.job\.name was 'job', is 'other'"):
        insist_same_job(objects, job(NARROW, name="other"))
    assert {name: objects.read(name) for name in before} == before


def test_what_the_data_nodes_will_say_is_not_guessed_before_they_are_asked(disk, objects):
    with open_store(
        disk, objects, job_id="job-1", settings=settings_of(job(NARROW), manifest_digest="d" * 64), slices=()
    ) as store:
        store.begin_epoch(scheduler="s", nonce="n")
    insist_same_job(objects, job(NARROW))
    with pytest.raises(ConfigError, match=r"scheduler\.job\.dataset was 'ddd.*', is 'eee"):
        insist_same_job(objects, job(NARROW, dataset=DatasetConfig(name="text", digest="e" * 64)))
