"""Reports that are told while the next step is taken: their order, their answers, and what one that fails does."""

import threading

import pytest

from hypha.errors import Refused
from hypha.protocol.bridge import BaseReady, SyncAt
from hypha.training.calls import Reports


def report(number):
    return BaseReady(round=number, digest="0" * 64)


class Worker:
    """Answers once it may; what it hears is kept in order."""

    def __init__(self):
        self.heard, self.may = [], threading.Semaphore(0)

    def __call__(self, said):
        self.heard.append(said.round)
        assert self.may.acquire(timeout=10)
        if said.round == 13:
            raise Refused("not this one")
        return SyncAt(round=said.round, batches=1)


def test_an_answer_is_heard_with_the_next_report():
    worker = Worker()
    reports = Reports(worker)
    assert reports.tell(report(1)) is None, "the worker has not answered: nobody waited for it"
    worker.may.release(2)
    assert reports.tell(report(2)) == SyncAt(round=1, batches=1)
    assert reports.hear() == SyncAt(round=2, batches=1)
    assert reports.hear() is None
    assert worker.heard == [1, 2]


def test_one_report_at_a_time_is_under_way():
    worker = Worker()
    reports = Reports(worker)
    reports.tell(report(1))
    second = threading.Thread(target=reports.tell, args=(report(2),))
    second.start()
    assert worker.heard in ([], [1])
    worker.may.release()
    second.join(10)
    worker.may.release()
    assert reports.hear() == SyncAt(round=2, batches=1)
    assert worker.heard == [1, 2]


def test_what_a_report_raised_is_raised_at_the_next_and_only_there():
    worker = Worker()
    reports = Reports(worker)
    worker.may.release(2)
    reports.tell(report(13))
    with pytest.raises(Refused, match="not this one"):
        reports.tell(report(2))
    assert reports.hear() is None
    assert worker.heard == [13]


def test_in_the_end_the_last_report_arrives_whatever_it_is_answered():
    worker = Worker()
    reports = Reports(worker)
    worker.may.release()
    reports.tell(report(13))
    reports.end()
    assert worker.heard == [13]
