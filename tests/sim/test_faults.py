"""Scripted failures, one at a time: what the job does about each, and that the sum comes out the same."""

import pytest

from tests.sim.flavours import Fault
from tests.sim.scenario import Scenario
from tests.sim.simulation import Report, simulate

AT_S = 3.0  # in the second or third round


def run(tmp_path, *faults: Fault, **fields) -> Report:
    scenario = Scenario(seed=1, flavour="scripted", rounds=5, samples=64, faults=faults, **fields)
    report = simulate(scenario, tmp_path)
    assert report.broken is None, report.broken
    return report


def happened(report: Report, *words: str) -> bool:
    return any(all(word in line for word in words) for line in report.lines)


def test_without_faults_nothing_rare_happens(tmp_path):
    report = run(tmp_path)
    assert (report.faults, report.situations) == ({}, {})
    assert happened(report, "Job finished", "rounds=5")


def test_a_dead_trainer_is_replaced_and_its_round_closes_without_it(tmp_path):
    report = run(tmp_path, Fault(at_s=AT_S, kind="silent-trainer", for_s=60.0))
    assert report.situations["lease lost by its holder"] == 1
    assert report.situations["worker lost"] == 1
    leased = [line for line in report.lines if "Worker leased" in line and "work=train" in line]
    assert len(leased) == report.scenario.trainers + 1


def test_a_dead_parameter_server_is_restored_elsewhere(tmp_path):
    report = run(tmp_path, Fault(at_s=AT_S, kind="silent-server", for_s=60.0))
    assert report.situations["parameter server restored"] == 1


def test_a_dead_scheduler_adopts_its_workers_when_it_is_back(tmp_path):
    report = run(tmp_path, Fault(at_s=AT_S, kind="crash-scheduler", for_s=2.0))
    assert report.situations["adopted lease"] == 4
    assert "lease expired at its grantor" not in report.situations


def test_workers_stop_when_their_scheduler_stays_away(tmp_path):
    report = run(tmp_path, Fault(at_s=AT_S, kind="crash-scheduler", for_s=20.0))
    assert report.situations["lease expired at its grantor"] == 4
    assert report.situations["parameter server restored"] == 1


def test_a_data_node_fails_over_to_the_other(tmp_path):
    fault = Fault(at_s=0.5, kind="silent-data-0", for_s=60.0)
    report = run(tmp_path, fault, slices=(20,) * 12)
    assert report.faults["silent crash: data-0"] == 1
    assert happened(report, "Job finished")


@pytest.mark.parametrize("kind", ["exit-trainer", "stall-trainer"])
def test_an_executor_that_fails_alone_costs_its_lease(tmp_path, kind):
    report = run(tmp_path, Fault(at_s=AT_S, kind=kind, for_s=1.0))
    assert report.situations["executor failed"] == 1


def test_a_partition_longer_than_the_lease_heals(tmp_path):
    report = run(tmp_path, Fault(at_s=AT_S, kind="cut-trainer", for_s=20.0))
    assert report.situations["lease lost by its holder"] == 1
    assert report.faults["message cut"] > 0


def test_a_worker_that_slept_past_its_deadline_finds_its_lease_dead(tmp_path):
    report = run(tmp_path, Fault(at_s=AT_S, kind="pause-trainer", for_s=16.0))
    assert report.situations["lease expired at its grantor"] == 1
