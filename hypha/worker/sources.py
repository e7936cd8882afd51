"""Model and preprocessor repositories, brought to this machine by the worker: executors have no network.

path         a directory that is here already (a shared file system), used as it is
repository   a hub id: safetensors weights, configuration and tokenizer files, in the hub's own cache
"""

import os
from pathlib import Path

from hypha.errors import PeerUnreachable, RemoteProtocolError
from hypha.protocol.job import ModelSpec, PreprocessorSpec

# Everything from_pretrained reads; never pickled weights, never code.
ALLOWED_FILES = ["*.json", "*.txt", "*.model", "*.safetensors", "*.jinja"]


def fetch_source(spec: ModelSpec | PreprocessorSpec) -> str:
    """Return the absolute directory of a job's model or preprocessor. Blocks; run it in a thread.

    Raises RemoteProtocolError (no such directory or repository) or PeerUnreachable (the hub does not answer).
    """
    if spec.path is not None:
        directory = Path(spec.path)
        if not directory.is_dir():
            raise RemoteProtocolError(f"path {spec.path!r} is not a directory on this worker")
        return str(directory.resolve())
    assert spec.repository is not None
    return _snapshot(spec.repository, spec.revision)


def _snapshot(repository: str, revision: str | None) -> str:
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return os.path.realpath(snapshot_download(repository, revision=revision, allow_patterns=ALLOWED_FILES))
    except LocalEntryNotFoundError as error:
        raise PeerUnreachable(f"hub: {repository}: {error}") from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise RemoteProtocolError(f"hub: {repository}: {error}") from error
    except (httpx.HTTPError, OSError) as error:
        raise PeerUnreachable(f"hub: {repository}: {error}") from error
