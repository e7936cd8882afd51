"""A whole job in one process: a scheduler, a parameter server's worker and training workers, over FakeBridges.

Job(tmp, workers=2) ─▶ aggregate.work and train.work in threads, each behind its own real bridge
what travels between machines is a copied file; what a scheduler decides is decided here, under one lock
"""

import shutil
import tempfile
import threading
from contextlib import ExitStack
from pathlib import Path

import msgspec
import numpy as np
from blake3 import blake3
from safetensors.numpy import save_file

from hypha.protocol.bridge import (
    BaseFetched,
    EvaluationDone,
    ExecutorFailed,
    FetchBase,
    FetchHeldOut,
    FetchResume,
    FetchSamples,
    FileRef,
    GoOn,
    HeldOutFetched,
    Merge,
    MergeDone,
    MergeFailed,
    MergeInput,
    NoSamples,
    RoundCommitted,
    SamplesFetched,
    Screen,
    Screened,
    SendAccepted,
    SendRebase,
    StateReady,
    Stop,
    SyncAt,
    TrainProgress,
    UpdateArrived,
    ViewChanged,
)
from hypha.protocol.job import (
    DatasetRef,
    HeldOutSlice,
    InnerOptimizer,
    JobSpec,
    ModelSpec,
    OuterOptimizer,
    Rounds,
)
from hypha.protocol.messages import Interval
from tests.training.fake_bridge import FakeBridge, Refusal

WIDTH, CLASSES = 8, 4
MLP = {"layers": [["linear", WIDTH, 16], ["tanh"], ["linear", 16, CLASSES]]}


def write_slice(path, *, rows=512, seed=0):
    """Points around four centres, labelled by centre: an MLP learns them in a few steps."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(CLASSES, WIDTH)) * 2
    labels = rng.integers(0, CLASSES, size=rows)
    inputs = (centres[labels] + rng.normal(size=(rows, WIDTH))).astype(np.float32)
    save_file({"inputs": inputs, "labels": labels.astype(np.uint8)}, str(path))
    return path


def job_spec(**changes):
    """A small job; `changes` replace fields of JobSpec."""
    fields = {
        "job_id": "job-1",
        "work": "train",
        "executor": "tiny",
        "model": ModelSpec(type="torch", config=MLP, seed=7),
        "dataset": DatasetRef(
            name="points",
            manifest_digest="0" * 64,
            schema={"inputs": f"F32[{WIDTH}]", "labels": "U8[]"},
            held_out=(HeldOutSlice(name="held", samples=128, bytes=1, digest="0" * 64),),
        ),
        "inner": InnerOptimizer(learning_rate=1e-2, weight_decay=0.0),
        "outer": OuterOptimizer(learning_rate=0.7, momentum=0.5),
        "rounds": Rounds(updates=3, samples_between_updates=64, max_batch_size=8),
    }
    return JobSpec(**{**fields, **changes})


def ref(path, root):
    """FileRef of an existing file."""
    data = path.read_bytes()
    return FileRef(path=str(path.relative_to(root)), bytes=len(data), digest=blake3(data).hexdigest())


class Machine:
    """One worker: a work directory, a bridge, and the answers to its executor."""

    def __init__(self, job, name):
        self.job, self.name = job, name
        self.dir = job.root / name
        self.dir.mkdir()
        # Socket paths are short: pytest's directories are not.
        self.socket = Path(tempfile.mkdtemp(prefix="hypha-")) / "s"
        self.bridge = FakeBridge(self.socket, self)
        self.reports = []

    def bring(self, path, name):
        """Copy a file here, as a transfer would."""
        target = self.dir / name
        shutil.copyfile(path, target)
        return ref(target, self.dir)

    def telemetry(self, kind, body):
        pass

    def fetch(self, message):
        with self.job.lock:
            return self.job.fetch(self, message)

    def send(self, message):
        with self.job.lock:
            return self.job.send(self, message)

    def report(self, message):
        with self.job.lock:
            self.reports.append(message)
            return self.job.report(self, message) or GoOn()


class Job:
    """The scheduler's part; use as a context manager. Tests subclass it to script what goes wrong."""

    tells_commits = True

    def __init__(self, root, spec=None, *, workers=2, sync_after=None):
        self.root, self.spec = root, spec or job_spec()
        self.sync_after = sync_after
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.slice = write_slice(root / "train.safetensors")
        self.held_out = write_slice(root / "held.safetensors", rows=128, seed=5)
        self.server = Machine(self, "server")
        self.workers = [Machine(self, f"worker-{n}") for n in range(workers)]
        self.view, self.round, self.close = 0, 0, 0
        self.base = None  # FileRef of model round-1, in the server's directory
        self.next_row = 0
        self.screened = 0
        self.held = {}  # worker name -> (SendUpdate, FileRef at the server)
        self.rounds = []  # MergeDone of every committed round
        self.evaluations = {}
        self.failures = []
        self.resume = None  # ResumeFetched, for jobs that begin at one
        self.stack = ExitStack()

    def __enter__(self):
        for machine in [self.server, *self.workers]:
            self.stack.enter_context(machine.bridge)
        return self

    def __exit__(self, *_):
        self.stack.close()
        for machine in [self.server, *self.workers]:
            shutil.rmtree(machine.socket.parent)

    def write_job(self, machine, work):
        """The job's JSON file as the worker would hand it over."""
        path = machine.dir / "job.json"
        path.write_bytes(msgspec.json.encode(msgspec.structs.replace(self.spec, work=work)))
        return path

    # --- what executors ask ---

    def fetch(self, machine, message):
        match message:
            case FetchBase():
                if self.base is None:
                    raise Refusal("no view yet", retry=True)
                file = machine.bring(self.server.dir / self.base.path, f"base-{self.round}-{self.view}.safetensors")
                return BaseFetched(round=self.round, digest=file.digest, files=(file,))
            case FetchSamples(round=round_, wanted=wanted):
                return self.grant(machine, round_, wanted)
            case FetchResume():
                return self.resume
            case FetchHeldOut():
                machine.bring(self.held_out, "held.safetensors")
                return HeldOutFetched(paths=("held.safetensors",))
        raise Refusal(f"not here: {message}")

    def grant(self, machine, round_, wanted):
        """Rows in order, the same file for everyone."""
        if round_ != self.round:
            return NoSamples(round=round_)
        if not (machine.dir / "train.safetensors").exists():
            machine.bring(self.slice, "train.safetensors")
        start, stop = self.next_row, min(self.next_row + wanted, 512)
        self.next_row = stop % 512
        return SamplesFetched(interval=Interval(epoch=0, slice=0, start=start, stop=stop), path="train.safetensors")

    def send(self, machine, update):
        """The parameter server takes it, if it is of the open round and base."""
        if (update.round, update.base_digest) != (self.round, self.base.digest):
            return SendRebase(round=self.round, base_digest=self.base.digest)
        (sent,) = update.files
        source = machine.dir / sent.path
        assert ref(source, machine.dir) == sent
        file = self.server.bring(source, f"spool-{update.round}-{machine.name}.safetensors")
        self.held[machine.name] = (update, file)
        self.server.bridge.push(Screen(ticket=len(self.held), round=update.round, file=file))
        return SendAccepted()

    def report(self, machine, report):
        match report:
            case StateReady():
                self.open_round(report.round + 1, report.model)
            case TrainProgress() if self.sync_after is not None:
                return SyncAt(round=report.round, batches=self.sync_after)
            case Screened():
                self.judged(report)
            case MergeDone():
                self.merged(report)
            case EvaluationDone():
                self.evaluations[report.round] = report
            case ExecutorFailed() | MergeFailed():
                self.failures.append(report.reason)
        self.changed.notify_all()
        return None

    # --- what a scheduler does ---

    def open_round(self, round_, base):
        self.round, self.base, self.held, self.screened = round_, base, {}, 0
        self.show_view(final=round_ > self.spec.rounds.updates)

    def show_view(self, *, final=False):
        self.view += 1
        for machine in self.workers:
            view = ViewChanged(
                view=self.view,
                round=self.round,
                base_digest=self.base.digest,
                member=machine in self.members(),
                committed_round=max(0, self.round - 2) if self.tells_commits else 0,
                final=final,
            )
            machine.bridge.push(view)

    def members(self):
        return self.workers

    def judged(self, report):
        """The round closes when the last update was found sound."""
        assert report.refusal is None
        self.screened += 1
        if self.screened == len(self.workers):
            self.merge()

    def merge(self):
        self.close += 1
        names = sorted(self.held)
        inputs = tuple(
            MergeInput(peer_id=name, fence=1, samples=self.held[name][0].samples, file=self.held[name][1])
            for name in names
        )
        self.server.bridge.push(Merge(round=self.round, close=self.close, base_digest=self.base.digest, inputs=inputs))

    def deliver(self, done):
        """The outer update goes to everyone."""
        for machine in self.workers:
            file = machine.bring(self.server.dir / done.update.path, f"arrived-{done.round}-{done.close}.safetensors")
            machine.bridge.push(
                UpdateArrived(
                    round=done.round,
                    close=done.close,
                    base_digest=self.base.digest,
                    model_digest=done.model.digest,
                    files=(file,),
                    parts=(done.model.digest,),
                )
            )

    def commit(self, done):
        self.rounds.append(done)
        for machine in [self.server, *self.workers] if self.tells_commits else [self.server]:
            machine.bridge.push(RoundCommitted(round=done.round, digest=done.model.digest))

    def merged(self, done):
        """Calm: delivered, committed, next round."""
        self.deliver(done)
        self.commit(done)
        self.open_round(done.round + 1, done.model)

    def stop_server(self):
        self.server.bridge.push(Stop(reason="done"))
