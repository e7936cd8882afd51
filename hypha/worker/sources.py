"""Model and preprocessor repositories, brought to this machine by the worker: executors have no network.

path         a directory that is here already (a shared file system), used as it is
repository   a hub id: safetensors weights, configuration and tokenizer files, in the hub's own cache
"""

import os
from pathlib import Path

from hypha.errors import PeerUnreachable, RemoteProtocolError
from hypha.protocol.job import ModelSpec, PreprocessorSpec

# Everything from_pretrained reads; never pickled weights, which run code when loaded, and never code.
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
    snapshot = _snapshot(spec.repository, spec.revision)
    if isinstance(spec, ModelSpec) and not any(Path(snapshot).rglob("*.safetensors")):
        raise RemoteProtocolError(
            f"hub: {_say(spec.repository, spec.revision)}: no safetensors weights; pickled ones are never loaded"
        )
    return snapshot


def _say(repository: str, revision: str | None) -> str:
    return repository if revision is None else f"{repository} at revision {revision}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _snapshot(repository: str, revision: str | None) -> str:
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    what = f"hub: {_say(repository, revision)}"
    try:
        return os.path.realpath(snapshot_download(repository, revision=revision, allow_patterns=ALLOWED_FILES))
    except LocalEntryNotFoundError as error:
        raise PeerUnreachable(f"{what}: {_one_line(error)}") from error
    except HfHubHTTPError as error:
        later = error.response.status_code >= 500 or error.response.status_code == 429
        raise (PeerUnreachable if later else RemoteProtocolError)(f"{what}: {_one_line(error)}") from error
    except HFValidationError as error:
        raise RemoteProtocolError(f"{what}: {_one_line(error)}") from error
    except (httpx.HTTPError, OSError) as error:
        raise PeerUnreachable(f"{what}: {_one_line(error)}") from error
