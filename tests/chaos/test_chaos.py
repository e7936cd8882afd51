"""The harness itself, without a network: what a seed decides, what a log tells, what counts as healed or lost."""

import json
import os
import signal
import subprocess
import sys

import psutil
import pytest
from msgspec import structs

from hypha.dataset import faults_of
from hypha.demo.loglines import LogLine
from hypha.worker.process import birth_of
from tests.chaos import cast, dataset, plan
from tests.chaos.aftermath import Aftermath, errors, growth, strangers
from tests.chaos.blows import Blows
from tests.chaos.growth import Growth
from tests.chaos.report import replacements
from tests.chaos.story import Story
from tests.chaos.troupe import Node, Use, executors, guarded, job_directories, signal_group, spares


class ThisProcess:
    """The parent of what a test starts, in a node's place."""

    process = True
    pid = os.getpid()


def told(*lines: tuple[str, dict]) -> Story:
    """Return the story of lines that came a second apart."""
    story = Story()
    for now, (message, fields) in enumerate(lines):
        story.take(LogLine("chaos-1", message, fields=fields), float(now))
    return story


def started(round_: int, epoch: int = 1) -> tuple[str, dict]:
    return "Job started", {"round": round_, "job_epoch": epoch, "samples_total": 0, "model_digest": "d"}


def opened(round_: int) -> tuple[str, dict]:
    return "Round opened", {"round": round_}


def committed(round_: int, contributors: int = cast.TRAINERS) -> tuple[str, dict]:
    return "Round committed", {"round": round_, "contributors": contributors, "samples_total": round_ * 100}


# --- the plan ---


def test_a_seed_decides_everything():
    assert plan.draw(30, 5) == plan.draw(30, 5)
    assert plan.draw(30, 5) != plan.draw(30, 6)
    assert plan.draw(30, 5)[:8] == plan.draw(8, 5)


@pytest.mark.parametrize("seed", range(5))
def test_eight_strikes_are_one_of_every_kind(seed):
    strikes = plan.draw(8, seed)
    assert {strike.role for strike in strikes} == set(plan.ROLES)
    assert {"leave", "take-over"} <= {strike.act for strike in strikes}


@pytest.mark.parametrize("kills", [1, 8, 300])
def test_every_card_has_its_turn_before_any_has_two_more(kills):
    dealt = [(strike.role, strike.act in ("leave", "take-over")) for strike in plan.draw(kills, 3)]
    roles = [role for role, _ in dealt]
    counts = {role: roles.count(role) / sum(card.role == role for card in plan.DECK) for role in plan.ROLES}
    assert len(roles) == kills
    assert max(counts.values()) - min(counts.values()) <= 1


def test_a_long_plan_has_every_act():
    acts = {(strike.role, strike.act) for strike in plan.draw(300, 0)}
    assert acts == {(card.role, act) for card in plan.DECK for act in card.acts}


def test_strikes_come_in_order_and_leave_rounds_to_heal_in():
    strikes = plan.draw(50, 1)
    rounds = [strike.round for strike in strikes]
    assert rounds == sorted(rounds)
    assert rounds[-1] + plan.ROUNDS_AFTER <= plan.rounds_for(50)


# --- the story ---


def test_a_step_that_was_merged_but_is_not_in_the_next_start_is_lost():
    story = told(started(1), opened(1), opened(2), committed(1), opened(3), started(2, epoch=2))
    assert (story.steps_lost, story.steps_lost_at_once_max) == (1, 1)


def test_a_start_after_the_last_commit_lost_nothing():
    story = told(started(1), opened(1), opened(2), committed(1), started(2, epoch=2))
    assert (story.steps_lost, [start.round for start in story.starts]) == (0, [0, 1])


def test_two_steps_lost_at_once_are_told_from_two_lost_one_by_one():
    at_once = told(started(1), opened(1), opened(2), opened(3), started(1, epoch=2))
    by_one = told(started(1), opened(1), opened(2), started(1, epoch=2), opened(1), opened(2), started(1, epoch=3))
    assert [(s.steps_lost, s.steps_lost_at_once_max) for s in (at_once, by_one)] == [(2, 2), (2, 1)]


def test_healed_is_a_round_that_opened_later_and_has_every_trainer():
    story = told(committed(1), committed(2), committed(3, contributors=1), committed(4))
    # Round 2 was open at the strike; round 3 had one trainer only.
    assert story.whole_again(2, since=0.5) == 3.0
    assert story.whole_again(4, since=0.5) is None


def test_a_lost_trainer_is_replaced_when_all_are_in_a_round_again():
    lost = ("Worker lost", {"work": "train"})
    story = told(committed(1), lost, committed(2, contributors=1), committed(3), ("Worker lost", {"work": "aggregate"}))
    assert list(replacements(story)) == [2.0]


def test_the_end_is_taken_from_the_log():
    end = {"samples": 700, "rounds": 7, "model_digest": "m", "model_file": "f", "wall_s": 9.5, "held_out": 0.25}
    story = told(started(1), ("Held-out loss", {"round": 7, "loss": 0.25}), ("Job finished", end))
    assert story.finished is not None
    assert (story.finished.loss, story.finished.samples, story.finished.rounds) == (0.25, 700, 7)
    assert story.held_out == {7: 0.25}
    assert told(("Job failed", {"reason": "nobody came"})).failure == "nobody came"


def test_who_started_last_leads_and_what_another_says_is_not_the_jobs():
    story = told(started(1), opened(1), opened(2), committed(1))
    assert story.leader == "chaos-1"
    message, fields = started(1, epoch=2)
    story.take(LogLine("chaos-2", message, fields=fields), 5.0)
    late, fields = committed(2)
    story.take(LogLine("chaos-1", late, fields=fields), 6.0)
    assert (story.leader, story.round) == ("chaos-2", 1)


# --- the aftermath ---


def test_growth_is_that_of_processes_which_lived_through_both_runs():
    before = Aftermath((), (), {("worker-1", 10): Use(100.0, 12), ("worker-2", 11): Use(100.0, 12)})
    after = Aftermath((), (), {("worker-1", 10): Use(104.5, 15), ("worker-2", 99): Use(500.0, 99)})
    assert growth(before, after) == {"processes": 1, "memory_mb_max": 4.5, "open_files_max": 3}


def test_errors_and_tracebacks_are_found_in_logs(tmp_path):
    (tmp_path / "worker-1.log").write_text(
        '{"message": "Job failed", "level": "error", "reason": "it broke"}\n'
        '{"message": "Job failed", "level": "error", "reason": "it broke"}\n'
        '{"message": "Lease lost", "level": "warn"}\n'
        "Traceback (most recent call last):\n"
    )
    assert errors(tmp_path) == {
        "worker-1: Job failed (it broke)": 2,
        "worker-1: Traceback (most recent call last):": 1,
    }


def test_a_process_in_the_directory_is_a_stranger_as_long_as_it_lives(tmp_path):
    with subprocess.Popen(["sleep", "60"], cwd=tmp_path) as left:
        found = strangers(tmp_path, ())
        left.kill()
    assert [words.partition(":")[0] for words in found] == [str(left.pid)]
    assert strangers(tmp_path, ()) == []


def test_executors_and_their_directories_are_found_by_the_workers_files(tmp_path):
    work = tmp_path / "work" / "worker-3"
    (work / "processes").mkdir(parents=True)
    (work / "hypha-job-7").mkdir()
    (work / "hypha-job-7" / "job.json").write_text('{"work": "aggregate"}')
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as process:
        record = {"pgid": process.pid, "birth": birth_of(process.pid)}
        (work / "processes" / "lease.json").write_text(json.dumps(record))
        (found,) = executors(tmp_path)
        signal_group(found.pgid, signal.SIGKILL)
    assert (found.worker, found.work, found.pgid) == ("worker-3", "aggregate", process.pid)
    assert executors(tmp_path) == []
    assert job_directories(tmp_path) == [work / "hypha-job-7"]


def test_a_spare_has_no_job_and_is_no_stranger_as_long_as_its_worker_keeps_it(tmp_path):
    processes = tmp_path / "work" / "worker-3" / "processes"
    processes.mkdir(parents=True)
    with subprocess.Popen(["sleep", "60"], cwd=processes, start_new_session=True) as process:
        record = {"pgid": process.pid, "birth": birth_of(process.pid), "mark": "warm-1-1"}
        (processes / "warm-1-1.json").write_text(json.dumps(record))
        (spare,) = spares(tmp_path)
        kept = strangers(tmp_path, [ThisProcess()])
        left = strangers(tmp_path, ())
        process.kill()
    assert (spare.work, spare.pgid) == ("spare", process.pid)
    assert executors(tmp_path) == []
    assert kept == []
    assert len(left) == 1


# --- growth ---


def lives(*samples: tuple[str, int, float, float, int]) -> dict:
    """Return the summary of (role, pid, age, MB, files)."""
    growth = Growth()
    for role, pid, age_s, memory_mb, files in samples:
        growth.note(role, pid, 0, age_s, Use(memory_mb, files))
    return growth.summary()


def test_growth_counts_from_when_a_process_has_settled_and_by_its_life():
    said = lives(
        ("worker", 1, 1.0, 10.0, 5),
        *(("worker", 1, age, 100.0 + age / 10, 9) for age in range(40, 161, 10)),
        *(("worker", 2, age, 300.0, 20 + age // 50) for age in range(40, 161, 10)),
    )
    assert said["rss_growth_mb"] == {"worker": 10.0}
    assert said["fd_growth"] == {"worker": 2}
    assert said["watched_s"] == {"worker": 240}
    assert said["rss_growth_mb_per_hour"] == {"worker": 150.0}


def test_who_did_not_live_long_enough_says_nothing_of_growth():
    assert lives(("data", 1, 41.0, 1.0, 1), ("data", 1, 60.0, 90.0, 50))["rss_growth_mb"] == {}


# --- strikes on real processes ---


class Puppet(Node):
    """A node whose program is a `sleep`, and a scheduler or worker by its name."""

    def __init__(self, name: str, directory, group: int) -> None:
        super().__init__(name, directory, group)
        self.command = ["sh", "-c", "sleep 60", name]


@pytest.fixture
def scene(tmp_path):
    """Blows on two schedulers and a worker; `leader` may be set."""
    (tmp_path / "logs").mkdir()
    with guarded() as group:
        scene = Scene(tmp_path, group)
        yield scene
        for node in scene.nodes.values():
            node.kill()


class Scene:
    def __init__(self, directory, group: int) -> None:
        self.leader = "scheduler-1"
        self.said: list[str] = []
        self.blows = Blows(directory, 6.0, lambda: self.leader, self.said.append)
        self.nodes = {name: Puppet(name, directory, group) for name in (*cast.SCHEDULERS, "worker-1")}
        for node in self.nodes.values():
            node.start()

    def hit(self, role: str, act: str, name: str) -> None:
        strike = structs.replace(plan.draw(1, 0)[0], role=role, act=act, pause_s=2.0, long=False)
        self.blows.hit(strike, [self.nodes[name]], round_open=1, now=100.0)


def test_a_scheduler_that_is_taken_over_from_stays_away_until_the_other_leads(scene):
    scene.hit("scheduler", "take-over", "scheduler-1")
    scene.blows.repair(1000.0)
    assert not scene.nodes["scheduler-1"].runs
    scene.leader = "scheduler-2"
    scene.blows.repair(1000.0)
    assert scene.nodes["scheduler-1"].runs
    assert scene.said[-1] == "scheduler-1 stands by"


def test_a_killed_scheduler_is_back_after_its_pause_and_not_before(scene):
    scene.hit("scheduler", "kill", "scheduler-1")
    scene.blows.repair(101.9)
    assert not scene.nodes["scheduler-1"].runs
    scene.blows.repair(102.0)
    assert scene.nodes["scheduler-1"].runs


def test_a_stopped_node_goes_on_after_two_ttls(scene):
    scene.hit("worker", "stop", "worker-1")
    scene.blows.repair(111.9)
    assert scene.nodes["worker-1"].stopped
    scene.blows.repair(112.0)
    assert not scene.nodes["worker-1"].stopped


def test_a_worker_that_leaves_is_remembered_with_its_exit_code_and_comes_back(scene):
    scene.hit("worker", "leave", "worker-1")
    scene.nodes["worker-1"].process.wait()
    scene.blows.look_after(103.0)
    (leaving,) = scene.blows.leavings
    assert (leaving.code, leaving.ended_s) == (-signal.SIGTERM, 3.0)
    scene.blows.repair(105.0)
    assert scene.nodes["worker-1"].runs


def test_nodes_do_not_outlive_a_harness_that_is_killed(tmp_path):
    (tmp_path / "logs").mkdir()
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from tests.chaos.test_chaos import Puppet, guarded\n"
        "with guarded() as group:\n"
        "    node = Puppet('worker-1', Path(sys.argv[1]), group)\n"
        "    node.start()\n"
        "    print(node.pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as harness:
        node = int(harness.stdout.readline())
        harness.kill()
    gone = psutil.wait_procs([psutil.Process(node)] if psutil.pid_exists(node) else [], timeout=30)[1]
    assert gone == []


def test_once_the_job_is_over_nobody_leads_it_again(scene):
    scene.hit("scheduler", "kill", "scheduler-1")
    scene.blows.over = True
    scene.blows.repair(0.0, everything=True)
    assert not scene.nodes["scheduler-1"].runs


# --- the scene ---


def test_the_dataset_is_sound_and_the_same_for_a_seed(tmp_path):
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        dataset.write(tmp_path / name, seed)
    assert faults_of(tmp_path / "one") == []
    manifests = [(tmp_path / name / "dataset.toml").read_bytes() for name in ("one", "again", "other")]
    assert manifests[0] == manifests[1] != manifests[2]
