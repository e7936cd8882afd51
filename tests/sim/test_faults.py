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


def test_nobody_is_moved_by_what_a_dead_scheduler_is_heard_to_say(tmp_path):
    report = run(tmp_path, Fault(at_s=AT_S, kind="echo-scheduler", for_s=1.6))
    assert report.situations["adopted lease"] == 4
    assert report.situations["stale view refused"] >= 4
    assert happened(report, "RenewLease echo", "arrived")
    assert "worker lost" not in report.situations


def test_echoes_of_renewals_keep_no_lease_alive(tmp_path):
    report = run(tmp_path, Fault(at_s=AT_S, kind="echo-scheduler", for_s=12.0))
    assert report.situations["lease expired at its grantor"] == 4


def test_whoever_wakes_in_the_midst_of_a_commit_finds_the_entry_taken(tmp_path):
    fault = Fault(at_s=AT_S, kind="pause-committer", for_s=9.0, pick=0.9)
    report = run(tmp_path, fault, standby=True, deadline_s=10.0)
    assert report.situations["entry of the chain lost to another"] >= 1
    assert report.situations["deposed scheduler"] == 1


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


def test_nobody_looks_at_a_wall_clock(tmp_path):
    for name in ("calm", "jumpy"):
        (tmp_path / name).mkdir()
    calm = run(tmp_path / "calm")
    jumps = [Fault(at_s=at_s, kind="wall-any", for_s=2.0, pick=pick) for at_s, pick in ((1.0, 0.1), (3.0, 0.9))]
    jumpy = run(tmp_path / "jumpy", *jumps)
    assert jumpy.faults == {"wall clock jump: any": 2}
    assert [line for line in jumpy.lines if "***" not in line and "heals" not in line] == list(calm.lines)


def test_a_clock_that_changes_its_rate_loses_no_lease(tmp_path):
    report = run(tmp_path, *(Fault(at_s=at_s, kind="drift-any", for_s=1.0, pick=at_s / 10) for at_s in (1, 2, 3, 4)))
    assert report.faults == {"change of clock rate: any": 4}
    assert "worker lost" not in report.situations


def test_a_worker_without_its_disk_comes_back_as_another(tmp_path):
    report = run(tmp_path, Fault(at_s=AT_S, kind="wipe-trainer", for_s=2.0))
    assert report.situations["worker back as another node"] == 1
    assert happened(report, "-anew INFO worker: Worker ready")


def test_a_second_scheduler_on_one_journal_is_refused(tmp_path):
    report = run(tmp_path, Fault(at_s=AT_S, kind="twin-scheduler", for_s=1.0))
    assert report.situations["second scheduler on one journal refused"] == 1
    assert not happened(report, "job_epoch=2")


@pytest.mark.parametrize("kind", ["silent-leader", "wipe-leader", "pause-leader", "unstored-leader"])
def test_a_standby_takes_over(tmp_path, kind):
    report = run(tmp_path, Fault(at_s=AT_S, kind=kind, for_s=20.0, pick=0.9), standby=True, deadline_s=10.0)
    assert report.situations["standby take-over"] >= 1
    assert report.situations.get("deposed scheduler", 0) == (kind in ("pause-leader", "unstored-leader"))
    assert happened(report, "standby INFO scheduler: Job finished", "rounds=5")


# Back before the hold lapses, just as it does, while the standby hires workers, and when it has long led.
@pytest.mark.parametrize(
    ("for_s", "leads"), [(2.0, "scheduler"), (6.0, "standby"), (7.0, "standby"), (12.0, "standby")]
)
def test_a_leader_that_comes_back_has_its_job_at_once_or_leaves_it_to_its_standby(tmp_path, for_s, leads):
    fault = Fault(at_s=AT_S, kind="crash-leader", for_s=for_s, pick=0.1)
    report = run(tmp_path, fault, standby=True, deadline_s=10.0)
    assert report.situations.get("started while another leads", 0) == (leads == "standby")
    assert report.situations.get("adopted lease", 0) == (4 if leads == "scheduler" else 0)
    assert "deposed scheduler" not in report.situations
    assert happened(report, f"{leads} INFO scheduler: Job finished", "rounds=5")
    begun = [line.split()[1] for line in report.lines if "INFO scheduler: Job started" in line]
    assert begun[:2] == ["scheduler", leads]


def test_a_leader_that_is_back_at_the_moment_of_the_take_over_stands_by(tmp_path):
    report = run(tmp_path, Fault(at_s=AT_S, kind="back-leader", for_s=1.0, pick=0.9), standby=True, deadline_s=10.0)
    assert report.situations["started while another leads"] == 1
    assert "deposed scheduler" not in report.situations
    assert happened(report, "standby INFO scheduler: Job finished", "rounds=5")


def test_what_the_journal_had_not_acknowledged_is_dropped(tmp_path):
    report = run(tmp_path, Fault(at_s=AT_S, kind="power-scheduler", for_s=1.0, pick=0.301))
    assert report.faults["torn write: scheduler"] == 1
    assert report.situations["torn write detected"] == 1


def test_a_decayed_checkpoint_is_passed_over(tmp_path):
    fault = Fault(at_s=AT_S, kind="decay-store", for_s=30.0, pick=0.2)
    report = run(tmp_path, fault, checkpoint_every=1, deadline_s=10.0)
    assert report.situations["older checkpoint used"] >= 1
    assert report.situations["parameter server restored"] == 1


def test_a_full_disk_of_the_scheduler_is_waited_for(tmp_path):
    report = run(tmp_path, Fault(at_s=AT_S, kind="full-scheduler", for_s=6.0))
    survived = ("full disk survived: journal", "full disk survived: store")
    assert any(report.situations.get(name) for name in survived)
    assert "worker lost" not in report.situations


def test_a_worker_on_which_jobs_fail_rests_before_it_offers_again(tmp_path):
    faults = [Fault(at_s=AT_S, kind=kind, for_s=12.0) for kind in ("full-server", "exit-server")]
    report = run(tmp_path, *faults, spares=0)
    assert 2 <= report.situations["executor failed"] <= 5
    assert happened(report, "No offer: a job failed here, this worker rests")


def test_an_update_that_is_not_finite_is_refused_by_name(tmp_path):
    report = run(tmp_path, Fault(at_s=AT_S, kind="spoil-trainer", for_s=1.0))
    assert report.situations["non-finite update refused"] >= 1
    assert happened(report, "Update refused", "worker=worker-")
    assert "worker lost" not in report.situations


def test_an_update_on_samples_of_others_is_excluded(tmp_path):
    report = run(tmp_path, Fault(at_s=AT_S, kind="claim-trainer", for_s=1.0))
    assert report.situations["contribution excluded"] == 1


def test_a_worker_joins_and_another_leaves(tmp_path):
    faults = (Fault(at_s=1.0, kind="join-worker", for_s=1.0), Fault(at_s=AT_S, kind="leave-trainer", for_s=4.0))
    report = run(tmp_path, *faults, growth=2)
    assert report.situations["late joiner ready in mid-round"] >= 1
    assert report.situations["polite leave"] == 1
    assert "lease lost by its holder" not in report.situations


def test_a_step_that_dies_with_its_server_is_made_again(tmp_path):
    report = run(tmp_path, Fault(at_s=AT_S, kind="silent-merger", for_s=30.0))
    assert report.situations["lost open step"] == 1
    assert report.situations["parameter server restored"] == 1


def test_a_worker_that_dies_in_mid_push_is_done_without(tmp_path):
    report = run(tmp_path, Fault(at_s=AT_S, kind="crash-pusher", for_s=30.0))
    assert report.situations["worker dead in mid-push"] == 1
