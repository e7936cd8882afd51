"""Objects are whole or absent; a store that cannot promise that is refused."""

import pytest

from hypha.errors import ConfigError, StoreError
from hypha.store.disk import AlreadyExists, NotFound, RealDisk
from hypha.store.memory_disk import MemoryDisk
from hypha.store.objects import CHUNK_BYTES, DirectoryObjects, RemoteObjects, open_objects


@pytest.fixture(params=["directory", "file-url", "fsspec"])
def objects(request, tmp_path):
    where = {"directory": str(tmp_path), "file-url": f"file://{tmp_path}", "fsspec": f"memory://{tmp_path.name}"}
    return open_objects(where[request.param])


def test_an_object_is_made_once_and_read_whole_or_in_pieces(objects):
    body = bytes(range(256)) * 10_000
    objects.create("kind/name", [body[:100], body[100:]])
    assert objects.read("kind/name") == body
    pieces = list(objects.chunks("kind/name"))
    assert b"".join(pieces) == body
    assert max(map(len, pieces)) <= CHUNK_BYTES
    with pytest.raises(AlreadyExists):
        objects.create("kind/name", [b"other"])
    assert objects.names("kind") == ["kind/name"]


def test_missing_objects_and_folders_are_told_apart(objects):
    assert objects.names("none") == []
    with pytest.raises(NotFound):
        objects.read("none/x")
    objects.remove("none/x")
    objects.create("some/x", [b""])
    objects.remove("some/x")
    assert objects.names("some") == []


def test_a_source_that_fails_leaves_nothing(objects):
    def broken():
        yield b"half"
        raise StoreError("the source broke")

    with pytest.raises(StoreError, match="source broke"):
        objects.create("kind/name", broken())
    assert objects.names("kind") == []


def test_parts_of_dead_writers_are_invisible_and_swept():
    disk = MemoryDisk()
    disk.mkdir("kind")
    disk.write_new("kind/name.1.part", b"half")
    objects = DirectoryObjects(disk)
    assert objects.names("kind") == []
    assert objects.sweep("kind") == ["kind/name.1.part"]
    assert disk.listdir("kind") == []


@pytest.mark.parametrize("url", ["https://example.com/x", "ftp://example.com/x", "nonsense://x"])
def test_a_store_without_exclusive_creation_is_refused(url):
    with pytest.raises(ConfigError, match="neither exclusive creation nor conditional put"):
        open_objects(url)


def test_a_store_whose_package_is_missing_is_refused_by_name():
    with pytest.raises(ConfigError, match="abfs"):
        open_objects("abfs://bucket/x")


def test_a_store_that_overwrites_on_a_conditional_put_is_refused():
    class Forgetful:
        def __init__(self):
            self.objects = {}

        def pipe_file(self, path, value, mode):
            self.objects[path] = value

        def rm_file(self, path):
            del self.objects[path]

    with pytest.raises(ConfigError, match="replaced what was there"):
        RemoteObjects(Forgetful(), "bucket").prove_conditional()


class ServiceAway(Exception):
    """As botocore's EndpointConnectionError: no OSError."""


class Away:
    """A file system whose service does not answer, or whose library has a bug."""

    def __init__(self, error):
        self.error = error

    def cat_file(self, path):
        raise self.error

    def pipe_file(self, path, value, mode):
        raise self.error


def test_a_service_that_does_not_answer_is_a_store_error_whatever_its_library_raises():
    objects = RemoteObjects(Away(ServiceAway("no route")), "bucket")
    with pytest.raises(StoreError, match="bucket/a: ServiceAway: no route"):
        objects.read("a")
    with pytest.raises(StoreError, match="bucket/a: ServiceAway: no route"):
        objects.create("a", [b"x"])
    with pytest.raises(ZeroDivisionError):
        RemoteObjects(Away(ZeroDivisionError()), "bucket").read("a")


def test_a_directory_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=r"checkpoint_url: .*file"):
        open_objects(str(tmp_path / "file" / "below"))


def test_directory_objects_are_served_from_where_they_lie(tmp_path):
    objects = DirectoryObjects(RealDisk(tmp_path))
    objects.create("a/b", [b"x"])
    assert objects.local_path("a/b").read_bytes() == b"x"
