"""What must be there when the job is over, and what must not: all rounds, the reference's model, nothing left behind.

chain ─▶ Reference ─▶ rounds, samples, the final model in the store      no job directory, executor or lease anywhere
"""

from typing import TYPE_CHECKING

from hypha.errors import StoreError
from hypha.protocol.shards import kind_of
from hypha.store.blobs import Artifact, Blobs
from hypha.store.objects import DirectoryObjects
from tests.sim.broken import Broken
from tests.sim.machines import unseen

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster


def look_over(cluster: "Cluster") -> None:
    """The job has finished and everybody had time to clear up. Raises Broken."""
    scenario, reference = cluster.scenario, cluster.invariants.of_the_whole_chain()
    finished = next(machine for machine in cluster.schedulers if machine.finished.is_set())
    assert finished.scheduler is not None
    assert finished.scheduler.coordinator is not None
    book = finished.scheduler.coordinator.book
    if reference.round != scenario.rounds:
        raise Broken("the job finishes", f"{reference.round} of {scenario.rounds} rounds are in the chain")
    if scenario.flavour == "calm" and cluster.chronicle.warnings:
        raise Broken("a calm run has no warnings", cluster.chronicle.warnings[0])
    for shard, digest in enumerate(reference.model_digests):
        _look_over_model(cluster, Artifact(kind=kind_of("model", shard), round=reference.round, digest=digest))
    if book.samples != reference.samples:
        raise Broken("L6 samples", f"{book.samples} counted, {reference.samples} in the chain")
    _look_over_workers(cluster)


def _look_over_model(cluster: "Cluster", final: Artifact) -> None:
    with unseen(cluster.store) as store:
        objects = DirectoryObjects(store)
        if final.name not in objects.names(final.kind):
            raise Broken("the final model is stored", f"{final.name} is not there")
        try:
            Blobs(objects).verify(final)
        except StoreError as error:
            if not cluster.decayed:
                raise Broken("the final model is stored", str(error)) from error


def _look_over_workers(cluster: "Cluster") -> None:
    for machine in cluster.workers:
        if machine.left_behind():
            raise Broken("nothing is left behind", f"{machine.name} has {machine.left_behind()}")
        if machine.is_up and machine.executors():
            raise Broken("nothing is left running", f"{machine.name}: {sorted(machine.work())}")
        if machine.is_up and machine.worker is not None and machine.worker.ledger.leases(machine.runtime.now()):
            raise Broken("L3 every lease is freed", f"{machine.name} still has leases after the job")
