"""Where a job's model and preprocessor come from: a directory the worker fetched, or nowhere (made from a config)."""

from pathlib import Path

from hypha.errors import RemoteProtocolError
from hypha.protocol.bridge import FetchSource, SourceFetched
from hypha.protocol.job import JobSpec
from hypha.training.models import NEXT_TOKEN_TASKS
from hypha.training.preprocess import Preprocessor
from hypha.training.session import Session


def fetch_source(session: Session, job: JobSpec, what: str = "model") -> Path | None:
    """The directory of the job's "model" or "preprocessor"; None where the job names none. Raises BridgeRefused."""
    spec = job.model if what == "model" else job.preprocessor
    if spec is None or (spec.repository is None and spec.path is None):
        return None
    fetched = session.fetch_patiently(FetchSource(what=what))
    if not isinstance(fetched, SourceFetched):
        raise RemoteProtocolError(f"worker answered FetchSource with {type(fetched).__name__}")
    return Path(fetched.directory)


def fetch_preprocessor(session: Session, job: JobSpec) -> Preprocessor:
    """The job's preprocessor, or one that does as good as nothing."""
    own_target = job.model.type in NEXT_TOKEN_TASKS
    return Preprocessor(job.preprocessor, fetch_source(session, job, "preprocessor"), own_target=own_target)
