"""An executor takes batches of the size it is told once it has heard of it, a batch later, and in later rounds."""

from hypha.protocol.bridge import SyncAt, TrainProgress
from tests.training.running import finish, start_server, start_workers
from tests.training.tiny_network import Job


class Sizing(Job):
    """Answers the first report of round 1 with another batch size; names none in later ones."""

    def __init__(self, *args, size, **options):
        super().__init__(*args, **options)
        self.size = size

    def report(self, machine, report):
        answer = super().report(machine, report)
        if isinstance(answer, SyncAt) and report.round == 1:
            return SyncAt(round=1, batches=answer.batches, batch_size=self.size)
        return answer


def sizes(job):
    said = [report for report in job.workers[0].reports if isinstance(report, TrainProgress)]
    return [(one.round, one.batch_size, one.samples) for one in said]


def test_batches_have_the_size_that_was_told_also_in_later_rounds(tmp_path):
    with Sizing(tmp_path, workers=1, sync_after=3, size=5) as job:
        finish(job, start_server(job), start_workers(job))
        assert sizes(job) == [
            *((1, 8, 8), (1, 8, 16), (1, 5, 21)),  # the second batch is under way when the first report is answered
            *((round_, 5, 5 * batches) for round_ in (2, 3) for batches in (1, 2, 3)),
        ]


def test_no_batch_is_larger_than_the_job_allows(tmp_path):
    with Sizing(tmp_path, workers=1, sync_after=3, size=1000) as job:
        finish(job, start_server(job), start_workers(job))
        assert {size for _, size, _ in sizes(job)} == {8}
