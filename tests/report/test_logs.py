from pathlib import Path

from metavpt.report.logs import MAX_WARNINGS, read_log, samples_at, series_of, times, warnings


def test_a_cut_last_line_is_skipped_and_a_bad_one_is_told(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1, "loss": 2}\n{"kind": "train", "st')
    whole = [{"kind": "train", "step": 1, "loss": 2}]
    assert read_log(path) == whole
    path.write_text("nonsense\n" + path.read_text())
    assert read_log(path) == [
        {"kind": "warning", "message": "metrics.jsonl line 1 cannot be read and was left out"},
        *whole,
    ]


def test_samples_lie_on_straight_lines_between_what_was_logged() -> None:
    log = [
        {"kind": "train", "step": step, "samples": samples}
        for step, samples in ((10, 640), (20, 960))
    ]
    assert samples_at(log, [0, 5, 10, 15, 20]).tolist() == [0, 320, 640, 800, 960]
    assert samples_at([], [0, 5]).tolist() == [0, 0]


def test_only_numbers_of_the_kind_that_was_asked_for() -> None:
    log = [
        {"kind": "designer", "step": 1, "value": 1, "ok": True, "solve": None},
        {"kind": "train", "step": 1, "value": 2},
        {"kind": "designer", "value": 3},
    ]
    assert series_of(log, "designer") == {"value": {1: 1.0}}
    assert times(
        [
            {"kind": "time", "seconds": {"learner": 1}},
            {"kind": "time", "seconds": {"learner": 3, "data": None}},
        ]
    ) == {"learner": 3.0}
    assert times([]) == {}


def test_warnings_are_grouped_over_runs() -> None:
    def log(*steps: int) -> list[dict]:
        return [{"kind": "warning", "step": step, "message": "odd"} for step in steps]

    assert warnings({"": log(3, 5, 9)}).groups == [("odd", 3, "step 3 to 9")]
    assert warnings({"a, seed 0": log(3), "b, seed 1": log(4, 4)}).groups == [
        ("odd", 3, "a, seed 0, step 3; b, seed 1, step 4")
    ]
    many = [{"kind": "warning", "message": f"{i}"} for i in range(MAX_WARNINGS + 2)]
    assert (len(warnings({"": many}).groups), warnings({"": many}).num_left_out) == (
        MAX_WARNINGS,
        2,
    )
