import json
from pathlib import Path

import pytest

from metavpt.data.decontaminate import Benchmarks, Decontaminated
from metavpt.data.gsm8k import read_word_problems
from metavpt.data.text import Document, open_documents
from metavpt.errors import MetaVPTError

ITEMS = [
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in "
    "May. How many clips did she sell in all?",
    "Weng earns $12 an hour for babysitting. Yesterday, she just did 50 minutes of babysitting. "
    "How much money did she earn that day?",
    "A robe takes 2 bolts of blue fiber and half that much white fiber. How many bolts in total "
    "does it take to make the robe?",
]
EXACT = Document(ITEMS[0], "72", "exact")
LOUD = Document(ITEMS[1].upper().replace(",", " --"), "10", "loud")
ONE_WORD = Document(ITEMS[2].replace("blue", "green"), "3", "one word")
PARAPHRASE = Document(
    "In April 48 friends bought a clip from Natalia; in May half of that number did. What is the "
    "sum?",
    "72",
    "other words",
)
UNRELATED = Document(
    "A train leaves at noon and goes 60 miles an hour. Where is it at two?",
    "120 miles off",
    "unrelated",
)
PLAIN = Document(
    "",
    "Some prose stands here first, about nothing at all. " * 8
    + ITEMS[2]
    + " And it goes on after that. " * 9,
    "page",
)
CLEAN = Document("", "Some prose stands here first, about nothing at all. " * 20, "clean page")
STREAM = [EXACT, LOUD, ONE_WORD, PARAPHRASE, UNRELATED, PLAIN, CLEAN]


def jaccard(first: str, second: str, n: int) -> float:
    """By definition, from lists of words."""
    sets = []
    for text in (first, second):
        words = "".join(letter if letter.isalnum() else " " for letter in text.lower()).split()
        sets.append({tuple(words[k : k + n]) for k in range(len(words) - n + 1)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_planted_near_duplicates():
    stream = Decontaminated(STREAM, Benchmarks({"gsm8k": ITEMS}))
    for _ in range(2):  # a second pass removes the same and counts nothing twice
        assert [document.where for document in stream] == ["other words", "unrelated", "clean page"]
        assert list(stream.removed) == ["exact", "loud", "one word", "page"]
    removed = stream.removed
    assert [(removed[where].item, removed[where].jaccard) for where in ("exact", "loud")] == [
        (0, 1.0),
        (1, 1.0),
    ]
    assert (removed["one word"].item, removed["one word"].text) == (2, ITEMS[2])
    assert removed["one word"].jaccard == pytest.approx(jaccard(ONE_WORD.question, ITEMS[2], 3))
    assert removed["page"].item == 2
    assert removed["page"].jaccard < 1


@pytest.mark.parametrize("ngram", [1, 3, 5])
def test_similarity_against_its_definition_and_the_threshold(ngram: int):
    expected = jaccard(ONE_WORD.question, ITEMS[2], ngram)
    for threshold, found in ((expected - 0.01, True), (expected + 0.01, False)):
        match = Benchmarks({"gsm8k": ITEMS}, ngram, threshold).match(ONE_WORD)
        assert (match is not None) == found
        assert match is None or match.jaccard == pytest.approx(expected)


def test_the_nearest_item_of_several_benchmarks_is_named():
    changed = ITEMS[0].replace("48", "49")
    match = Benchmarks({"one": ITEMS[1:], "two": [changed, ITEMS[0]]}).match(EXACT)
    assert match is not None
    assert (match.benchmark, match.item, match.jaccard) == ("two", 1, 1.0)


def test_report(tmp_path: Path):
    stream = Decontaminated(
        STREAM, Benchmarks({"gsm8k": ITEMS, "other": ["Nothing of this kind is found in it."]})
    )
    list(stream)
    stream.write_report(tmp_path / "report.jsonl")
    counts, *rows = map(
        json.loads, (tmp_path / "report.jsonl").read_text(encoding="utf-8").splitlines()
    )
    assert counts == {
        "read": 7,
        "removed": 4,
        "by_benchmark": {"gsm8k": 4, "other": 0},
        "ngram": 3,
        "threshold": 0.5,
    }
    assert [row["where"] for row in rows] == ["exact", "loud", "one word", "page"]
    assert rows[0]["text"] == ITEMS[0]
    assert rows[0]["jaccard"] == 1
    list(
        again := Decontaminated(
            STREAM, Benchmarks({"gsm8k": ITEMS, "other": ["Nothing of this kind is found in it."]})
        )
    )
    again.write_report(tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "report.jsonl").read_bytes()


def test_short_items_and_bad_options():
    benchmarks = Benchmarks({"short": ["Two plus two?", "Why?", ""]})
    assert benchmarks.match(Document("why", "so")) is not None
    assert benchmarks.match(Document("?!", "no words at all")) is None
    with pytest.raises(MetaVPTError, match="the benchmarks hold no text"):
        Benchmarks({"none": ["", "?"]})
    for options in ({"ngram": 0}, {"threshold": 0.0}, {"threshold": 1.5}, {"num_perm": 4}):
        with pytest.raises(MetaVPTError, match="decontaminate: ngram="):
            Benchmarks({"gsm8k": ITEMS}, **options)


@pytest.mark.shared_data
def test_real_streams_against_gsm8k(shared_data: Path):
    """Exactly the two train rows that equal a test row up to numbers."""
    benchmarks = Benchmarks(
        {
            "gsm8k": [
                problem.question
                for problem in read_word_problems(shared_data / "gsm8k" / "test.jsonl")
            ]
        }
    )
    train = Decontaminated(
        [p.document for p in read_word_problems(shared_data / "gsm8k" / "train.jsonl")], benchmarks
    )
    assert len(list(train)) == 7471
    assert sorted(where.rsplit(" ", 1)[1] for where in train.removed) == ["1315", "5163"]
    assert all(0.55 < match.jaccard < 0.6 for match in train.removed.values())
    mathematics = open_documents(
        shared_data / "mathtext" / "mathqa_test.jsonl",
        {"question": ["problem"], "answer": "solution"},
    )
    planted = [*mathematics, EXACT._replace(question=benchmarks.items[5][2])]
    stream = Decontaminated(planted, benchmarks)
    assert len(list(stream)) == 1000
    assert list(stream.removed) == ["exact"]
