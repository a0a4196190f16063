"""Answers and targets on the page of a run: all logged texts, escaped."""

import json
from pathlib import Path

from helpers.html_page import HOSTILE, Page, assert_self_contained

from metavpt import RunLog, report
from metavpt.probes.samples import Answer, Candidate, Texts, Token
from metavpt.report.texts import read_texts, visible

PASSAGE = [
    Token("Question:"),
    Token(" 7", 0.25, [Candidate(" 7", 0.75), Candidate(" 8", 0.2), Candidate("\n", 0.05)]),
    Token(f" {HOSTILE}", 0.0, [Candidate(HOSTILE, 1.0)]),
]


def answers(given: str, right: bool) -> list[Answer]:
    return [
        Answer("What is 3 + 4?", "#### 7", given, right),
        Answer(HOSTILE, "#### 1", HOSTILE, False),
    ]


def written(folder: Path) -> Path:
    log = RunLog(folder)
    log.write("probe", 0, metrics={"answers/nll": 1.0})
    log.save_texts(0, Texts([], answers("no idea", False)))
    log.save_texts(20, Texts([PASSAGE], answers("#### 8", False)))
    log.save_texts(40, Texts([PASSAGE, PASSAGE[1:]], answers("#### 7", True)))
    return folder


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    page = read_texts(written(tmp_path) / "texts")
    assert (page.steps, page.step, page.passages) == ((0, 40), 40, [PASSAGE, PASSAGE[1:]])
    assert [(answer.first.given, answer.last and answer.last.given) for answer in page.answers] == [
        ("no idea", "#### 7"),
        (HOSTILE, HOSTILE),
    ]


def test_the_page_shows_answers_before_and_after_and_the_last_targets(tmp_path: Path) -> None:
    html = report.write_report(written(tmp_path)).read_text()
    page = Page(html)
    for text in (
        "What is 3 + 4?",
        "no idea",
        "#### 7",
        "right",
        "step 40",
        "\N{MIDDLE DOT}8 20.0 %",
        "\N{RETURN SYMBOL} 5.0 %",
        HOSTILE,
    ):
        assert text in page.text, text
    assert "#### 8" not in page.text
    assert [
        value for name, value in page.attributes if name == "style" and "gate" in str(value)
    ] == ["--gate: 0.250", "--gate: 0.000"] * 2
    assert "script" not in page.tags


def test_the_page_shows_how_much_each_token_counts(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.write("probe", 0, metrics={"answers/nll": 1.0})
    passage = [Token("Question:"), Token(" 7", 0.0, weight=1.5), Token(HOSTILE, 0.0, weight=9.0)]
    log.save_texts(40, Texts([passage], []))
    assert read_texts(tmp_path / "texts").passages == [passage]
    html = report.write_report(tmp_path).read_text()
    page = Page(html)
    for text in ("How much each token counted", "counts 1.50 times", "counts 9.00 times", HOSTILE):
        assert text in page.text, text
    assert "trained to predict" not in page.text
    assert [
        value for name, value in page.attributes if name == "style" and "gate" in str(value)
    ] == ["--gate: 0.500", "--gate: 1.000"]


def test_the_page_needs_no_network_and_runs_nothing(tmp_path: Path) -> None:
    written(tmp_path)
    log = RunLog(tmp_path)
    for step in (0, 10):
        log.write("train", step, loss=1.0)
    assert_self_contained(report.write_report(tmp_path).read_text())


def test_a_run_without_texts_has_no_such_sections_and_a_broken_file_is_passed_over(
    tmp_path: Path,
) -> None:
    log = RunLog(tmp_path)
    log.write("probe", 0, metrics={"rmse": 1.0})
    log.save_texts(0, Texts([], []))
    assert not (tmp_path / "texts").exists()
    html = report.write_report(tmp_path).read_text()
    assert "Answers" not in html
    assert "Targets" not in html
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(
        ('{"passages": [', "[]", '{"passages": [[1]], "answers": []}', json.dumps({"answers": []}))
    ):
        (tmp_path / "texts" / f"step{number:06d}.json").write_text(text)
    assert read_texts(tmp_path / "texts") == read_texts(tmp_path / "nowhere")
    report.write_report(tmp_path)


def test_spaces_and_line_breaks_are_made_visible() -> None:
    assert visible(" a\n") == "\N{MIDDLE DOT}a\N{RETURN SYMBOL}"
