"""Where one job's state lies, held by one scheduler at a time.

{state_dir}/{job}.lock          flock(2) while the scheduler runs
{state_dir}/{job}/              journal, chain, records, checkpoints        (`store`)
{state_dir}/{job}/downloads/    what is on its way between network and store: emptied at start
{state_dir}/{job}.before-1/     what --fresh set aside; never deleted by us
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from msgspec import Struct

from hypha.errors import ConfigError, StoreError
from hypha.scheduler.config import Config, JobConfig
from hypha.scheduler.hold import FOLDER as HOLD_FOLDER
from hypha.scheduler.settings import AnotherJob, insist_same, settings_of
from hypha.scheduler.shapes import differing_shapes
from hypha.scheduler.store import chain_says
from hypha.store.blobs import CHECKPOINT_KINDS, RECORD_KIND
from hypha.store.chain import FOLDER as CHAIN_FOLDER
from hypha.store.disk import Disk, Held, RealDisk
from hypha.store.objects import ObjectStore, open_objects
from hypha.telemetry import get_logger

log = get_logger("scheduler")


# What a job's store has: a part that is left in one may be as large as a model.
FOLDERS = (CHAIN_FOLDER, HOLD_FOLDER, RECORD_KIND, *CHECKPOINT_KINDS)


class InUse(ConfigError):
    """Another process holds the job's directory."""


class Place(Struct, frozen=True, kw_only=True):
    """Where a job's state goes: the journal's disk, the store of chain and artifacts, and local scratch space."""

    disk: Disk
    objects: ObjectStore
    directory: Path


@contextmanager
def open_place(config: Config, *, fresh: bool = False) -> Iterator[Place]:
    """Open the job's directories, alone; with `fresh`, what is there is set aside first.

    Raises ConfigError: in use by another scheduler, not writable, another job's, or a store from which nothing can be
    set aside.
    """
    name = config.scheduler.job.name
    directory = config.state_dir / name
    with ExitStack() as held:
        try:
            held.enter_context(RealDisk(config.state_dir).lock(f"{name}.lock"))
        except Held as error:
            raise InUse(f"state_dir: {error}; one scheduler leads a job") from error
        except StoreError as error:
            raise ConfigError(f"state_dir: {error}") from error
        try:
            if fresh:
                _set_aside(directory)
            disk = RealDisk(directory)
            objects = _objects(config, directory, fresh=fresh)
            insist_same_job(objects, config.scheduler.job)
            _sweep(objects)
            downloads = directory / "downloads"
            shutil.rmtree(downloads, ignore_errors=True)
            os.makedirs(downloads, exist_ok=True)
        except (StoreError, OSError) as error:
            raise ConfigError(f"state_dir: {error}") from error
        yield Place(disk=disk, objects=objects, directory=downloads)


def insist_same_job(objects: ObjectStore, job: JobConfig) -> None:
    """Refuse a store in which another job lies, or one of other settings, before anybody is asked to work. Blocks.

    Raises ConfigError, naming the settings, and the shapes where it is another model; StoreError for a damaged chain.
    """
    begun = chain_says(objects)
    if begun is None:
        return
    job_id, settings = begun
    mine = settings_of(job, manifest_digest=job.dataset_config.digest or "")
    try:
        insist_same(settings, mine, where=f"the checkpoint store (job {job_id})")
    except AnotherJob as error:
        theirs, ours = error.models
        raise error.with_shapes(differing_shapes(objects, ours) if theirs != ours else "") from None


def in_use(config: Config) -> str | None:
    """Return why the job's directories cannot be had now, None where they can. Blocks. Raises ConfigError."""
    try:
        with open_place(config):
            return None
    except InUse as error:
        return str(error)


def job_objects(config: Config) -> ObjectStore:
    """Open the store of chain and artifacts alone. Blocks. Raises ConfigError: not writable, or another job's."""
    objects = _objects(config, config.state_dir / config.scheduler.job.name, fresh=False)
    insist_same_job(objects, config.scheduler.job)
    return objects


def _objects(config: Config, directory: Path, *, fresh: bool) -> ObjectStore:
    if config.checkpoint_url is None:
        return open_objects(str(directory))
    url = f"{config.checkpoint_url.rstrip('/')}/{config.scheduler.job.name}"
    parts = urlsplit(url)
    if fresh and parts.scheme in ("", "file"):
        try:
            _set_aside(Path(parts.path if parts.scheme else url))
        except OSError as error:
            raise ConfigError(f"checkpoint_url: {error}") from error
    objects = open_objects(url)
    if fresh and objects.names("chain"):
        raise ConfigError(f"checkpoint_url: {url} holds a job that cannot be set aside; name the job differently")
    return objects


def _sweep(objects: ObjectStore) -> None:
    left = [part for folder in FOLDERS for part in objects.sweep(folder)]
    if left:
        log.info("What was being written when the last run ended is removed", files=len(left), first=left[0])


def _set_aside(directory: Path) -> None:
    if not directory.exists():
        return
    number = 1
    while (aside := directory.with_name(f"{directory.name}.before-{number}")).exists():
        number += 1
    directory.rename(aside)
    log.info("The job starts over; its state was set aside", directory=str(aside))
