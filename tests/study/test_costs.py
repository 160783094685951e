"""What a study cost: the shares of training, evaluation, records and waiting."""

from pathlib import Path

from study_records import record

from largebatch.study.costs import StudyCost, add_cost, read_cost


def test_what_a_study_cost_adds_up_over_the_times_it_was_begun(tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text('{"study": {"join": false}}\n')
    assert read_cost(tmp_path) is None
    for number, worker_seconds in enumerate((20.0, 30.0)):
        cost = StudyCost(worker_seconds=worker_seconds)
        seconds = {"seconds": 16.0, "evaluation_seconds": 4.0, "record_seconds": 2.0}
        cost.take(record(tmp_path / f"run-{number}", 100, **seconds))
        add_cost(tmp_path, cost)
    total = read_cost(tmp_path)
    assert total == StudyCost(2, 32.0, 8.0, 4.0, 50.0)
    assert total.in_words() == (
        "2 runs in 50 seconds of workers: 40% training, 16% evaluation, 8% records, 36% waiting"
    )
    assert '"join": false' in (tmp_path / "study.json").read_text()


def test_where_workers_are_not_counted_waiting_is_not_told(tmp_path: Path) -> None:
    cost = StudyCost()
    assert cost.in_words() == ""
    cost.take(record(tmp_path / "run", 100, seconds=10.0))  # of before: no shares within
    assert cost.in_words() == (
        "1 runs in 10 seconds of workers: 100% training, 0% evaluation, 0% records"
    )
    (tmp_path / "study.json").write_text('{"cost": {"runs": -1}}\n')
    assert read_cost(tmp_path) is None
