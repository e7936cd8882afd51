"""Clocks set by an hour in mid-run, to different sides: the job goes on, leases and all; only dates in logs jump.

wall.c ─ cc ─▶ wall.so ─ LD_PRELOAD ─▶ the C library's wall clock plus what a file says; monotonic clocks stay
"""

import shutil
import subprocess
from datetime import UTC, datetime, timedelta

import pytest

from tests.conftest import Pki
from tests.e2e.programs import stage
from tests.e2e.test_recovery import JOB, Town, committed, rounds_of

COMPILER = shutil.which("cc")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(COMPILER is None, reason="no C compiler to make a clock with"),
]

ROUNDS = 8
WALL = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static long offset(void) {
    const char *path = getenv("WALL_OFFSET"); char text[32] = {0};
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0) return 0;
    ssize_t count = read(file, text, 31); close(file);
    return count > 0 ? atol(text) : 0;
}
int clock_gettime(clockid_t id, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(id, now);
    if (result == 0 && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) now->tv_sec += offset();
    return result;
}
int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec exact; int result = clock_gettime(CLOCK_REALTIME, &exact);
    if (now) { now->tv_sec = exact.tv_sec; now->tv_usec = exact.tv_nsec / 1000; }
    return result;
}
time_t time(time_t *out) {
    struct timespec exact; clock_gettime(CLOCK_REALTIME, &exact);
    if (out) *out = exact.tv_sec;
    return exact.tv_sec;
}
"""
# Certificates that are younger than an hour would not be valid yet.
ISSUED_BEFORE_S = 7200


class ClockTown(Town):
    """Every node has a wall clock of its own."""

    def start(self, name, role):
        offset = self.stage.directory / f"{name}.clock"
        offset.write_text("0")
        shim = self.stage.directory / "wall.so"
        command = ["env", f"LD_PRELOAD={shim}", f"WALL_OFFSET={offset}", f"hypha-{role}", "run", "-c", f"{name}.toml"]
        return self.stage.start(name, command)

    def set_clock(self, name, seconds):
        (self.stage.directory / f"{name}.clock").write_text(str(seconds))


@pytest.fixture(scope="module")
def old_pki(tmp_path_factory):
    return Pki(tmp_path_factory.mktemp("old-pki"), start=datetime.now(UTC) - timedelta(seconds=ISSUED_BEFORE_S))


def test_clocks_that_are_set_by_an_hour_change_nothing_but_dates(tmp_path, old_pki):
    (tmp_path / "wall.c").write_text(WALL)
    subprocess.run([COMPILER, "-shared", "-fPIC", "-o", "wall.so", "wall.c", "-ldl"], cwd=tmp_path, check=True)
    with stage(tmp_path) as opened:
        town = ClockTown(opened, old_pki)
        town.begin()
        town.node("scheduler", "scheduler", JOB.replace("updates = 8", f"updates = {ROUNDS}"))
        scheduler = town.start("scheduler", "scheduler")
        scheduler.wait_for(committed(2))
        for name, seconds in {"gateway": 3600, "scheduler": 3600, "train-1": -3600, "serve-1": -3600}.items():
            town.set_clock(name, seconds)
        scheduler.wait_for(committed(4))
        serving = next(
            n for n in ("serve-1", "serve-2") if any("Job started" in line for line in opened.programs[n].lines)
        )
        opened.programs[serving].kill()  # its place is taken over connections that are new
        scheduler.wait_for(committed(6))
        town.set_clock("scheduler", -3600)
        assert scheduler.wait(200) == 0, "\n".join(scheduler.lines[-30:])
        assert [entry.merged.round for entry in rounds_of(town.chain())] == list(range(1, ROUNDS + 1))
        lost = [r["work"] for r in scheduler.records() if r["message"] == "Worker lost"]
        assert lost == ["aggregate"]
        times = [record["timestamp"] for record in scheduler.records()]
        assert times != sorted(times)
        assert scheduler.errors() == []
