"""The directories of jobs: which are a worker's own, and that they go whatever is in them."""

from hypha.worker.jobs import job_directories, remove_leftovers, remove_tree


def test_a_directory_goes_whatever_the_executor_made_of_it(tmp_path):
    job = tmp_path / "hypha-job-1-1"
    (job / "locked" / "inner").mkdir(parents=True)
    (job / "locked" / "inner" / "file").write_text("x")
    (job / "out").symlink_to(tmp_path / "kept")
    (tmp_path / "kept").mkdir()
    (job / "locked" / "inner").chmod(0)
    (job / "locked").chmod(0)
    remove_tree(job)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    remove_tree(job)  # what is gone may be removed again


def test_only_job_directories_of_earlier_runs_are_removed(tmp_path):
    for name in ("hypha-job-a-7", "hypha-job-1-12", "hypha-demo", "cache", "processes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("x")
    (tmp_path / "hypha-notes-3").write_text("a file")
    assert sorted(job_directories(tmp_path).values()) == [7, 12]
    assert remove_leftovers(tmp_path) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "hypha-demo", "hypha-notes-3", "processes"]
