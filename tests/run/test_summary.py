import io
import json

from rich.console import Console

from metavpt.run.summary import spending, table

RECORDS = [
    {"kind": "probe", "step": 0, "metrics": {"depth_rmse": 1.0, "seg_miou": 0.2}},
    *(
        {"kind": "designer", "step": step, "value": value}
        for step, value in zip(range(8), (1, 3, 0, 0, 0, 0, 5, 7), strict=True)
    ),
    {"kind": "train", "step": 8, "samples_per_s": 123.4},
    {
        "kind": "time",
        "step": 8,
        "seconds": {"learner": 6.0, "designer": 2.0, "task": 2.0, "probe": 90.0},
    },
    {
        "kind": "probe",
        "step": 8,
        "metrics": {"depth_rmse": 0.9, "seg_miou": 0.1},
        "directions": {"depth_rmse": "lower", "seg_miou": "higher"},
    },
]


def test_value_trend_throughput_and_shares_of_the_training_time():
    assert spending(RECORDS) == [
        "value V: +2 -> +6 over 8 designer updates",
        "throughput: 123 samples/s",
        "training time: learner 60%, designer updates 20%, task construction 20%",
    ]


def test_a_run_without_a_designer_says_nothing_of_its_value():
    assert (
        spending(
            [record for record in RECORDS if record["kind"] not in ("designer", "time", "train")]
        )
        == []
    )


def test_the_table_holds_step_0_the_end_and_a_verdict(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in RECORDS)
    )
    console = Console(file=io.StringIO(), width=120)
    console.print(table(tmp_path))
    shown = console.file.getvalue()
    rmse, miou = (
        next(line for line in shown.splitlines() if name in line)
        for name in ("depth_rmse", "seg_miou")
    )
    assert rmse.split() == ["depth_rmse", "1", "0.9", "−0.1", "better"]
    assert miou.split() == ["seg_miou", "0.2", "0.1", "−0.1", "worse"]
    assert "value V: +2 -> +6" in shown
