"""NLL, Pass@k and perplexity against what their definitions give by hand."""

import math
import random
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.tiny_lm import dense_log_probs, packed, tiny_lm

from metavpt.data.gsm8k import WordProblem
from metavpt.errors import MetaVPTError
from metavpt.hypergradients import params
from metavpt.probes.answers import (
    AnswerProbe,
    flexible,
    is_equal,
    is_flexible_match,
    is_strict_match,
    pass_at_k,
    strict,
)
from metavpt.probes.perplexity import PerplexityProbe, mean_nll


@pytest.mark.parametrize(("n", "c"), [(1, 0), (1, 1), (5, 0), (5, 2), (6, 5), (6, 6)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n: int, c: int) -> None:
    right = [k < c for k in range(n)]
    for k in range(1, n + 1):
        subsets = list(combinations(right, k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, 1, 5), (4, 1, 0), (4, -1, 2)])
def test_impossible_counts_are_an_error(n: int, c: int, k: int) -> None:
    with pytest.raises(MetaVPTError, match="pass@k"):
        pass_at_k(n, c, k)


class Scripted:
    """Says what it was told to, whatever the learner."""

    def __init__(self, greedy: list[str], sampled: list[str]) -> None:
        self.greedy, self.sampled, self.encoder = greedy, sampled, self

    def prompt(self, question: str) -> str:
        return question

    def __call__(
        self, learner: Any, prompts: list[str], temperature: float = 0.0, seed: int = 0
    ) -> list[str]:
        texts = self.sampled if temperature else self.greedy
        assert len(prompts) == len(texts)
        return texts


PROBLEMS = [
    WordProblem("2 + 2?", "2 + 2 = 4", "4"),
    WordProblem("1000 + 600?", "", "1600"),
    WordProblem("0?", "", "0"),
]


def test_the_probe_scores_greedy_and_sampled_answers() -> None:
    greedy = ["#### 4", "It is $1,600.00", "nothing"]
    sampled = [
        "#### 4",
        "#### 5",
        "#### 6",
        "#### 4",
        *["#### 1600"] * 4,
        *["it is 0", "1", "2", "3"],
    ]
    batches = [packed([[7], [5]], seed=1), packed([[9]], seed=2)]
    probe = AnswerProbe(
        PROBLEMS, lambda: batches, Scripted(greedy, sampled), num_samples=4, ks=(1, 2)
    )  # type: ignore[arg-type]
    learner = tiny_lm()
    metrics = probe(learner)
    log_probs = [
        dense_log_probs(learner, params.detach(params.named(learner)), batch) for batch in batches
    ]
    true = [
        torch.stack([batch.tokens[b, t] for b, t in batch.loss_mask.nonzero().tolist()])
        for batch in batches
    ]
    chosen = torch.cat(
        [table.gather(1, ids[:, None]) for table, ids in zip(log_probs, true, strict=True)]
    )
    nll = -float(chosen.mean())
    assert probe.directions == {name: "lower" if name == "nll" else "higher" for name in metrics}
    assert metrics.pop("nll") == pytest.approx(nll, rel=1e-12)
    assert metrics == pytest.approx({
        "pass@1_strict": 1 / 3, "pass@1_flexible": 2 / 3,
        "sampled_pass@1_strict": (2 / 4 + 1 + 0) / 3,
        "sampled_pass@2_strict": (1 - 1 / 6 + 1 + 0) / 3,
        "sampled_pass@1_flexible": (2 / 4 + 1 + 1 / 4) / 3,
        "sampled_pass@2_flexible": (5 / 6 + 1 + 1 / 2) / 3,
    })  # fmt: skip
    assert [(answer.given, answer.is_right) for answer in probe.answers] == [
        *zip(greedy, [True, True, False], strict=True)
    ]
    perplexity = PerplexityProbe(lambda: batches)
    assert perplexity(learner) == {"perplexity": pytest.approx(math.exp(nll))}
    assert perplexity.directions == {"perplexity": "lower"}
    assert mean_nll(learner, batches[:1]) != pytest.approx(nll)


def test_the_perplexity_of_a_learner_that_went_astray_is_infinite() -> None:
    learner = tiny_lm(tie_word_embeddings=False)
    with torch.no_grad():
        learner.transformers_model.lm_head.weight.mul_(1e6)
    batches = [packed([[7], [5]])]
    assert mean_nll(learner, batches) > 1000
    assert PerplexityProbe(lambda: batches)(learner) == {"perplexity": math.inf}


def test_samples_must_be_enough_for_k() -> None:
    with pytest.raises(MetaVPTError, match=r"ks=\[1, 16\] must lie in 1 to num_samples=4"):
        AnswerProbe(PROBLEMS, list, Scripted([], []), num_samples=4, ks=(1, 16))


ANSWERS = {  # text -> (strict, flexible)
    "48 / 2 = 24 clips.\n48 + 24 = 72\n#### 72": ("72", "72"),
    "#### 1,600": ("1,600", "1,600"),
    "####$18.50": (None, "$18.50"),
    "#### $18.50": (None, "$18.50"),
    "####42": (None, "42"),
    "####  42": (None, "42"),
    "#### 42.": ("42.", "42"),
    "#### -3": ("-3", "-3"),
    "#### \u22123": (None, "-3"),
    "He earned $1,234,567.25 in all.": (None, "$1,234,567.25"),
    "#### 5\nQuestion: and 6?": ("5", "6"),
    "The answer is 7. #### none": (None, "7"),
    "from 10-3 we get 7, so 12": (None, "12"),
    "10-3": (None, "3"),
    "2,34": (None, "34"),
    "a rate of .5": (None, ".5"),
    "no number": (None, None),
    "": (None, None),
}


@pytest.mark.parametrize(("text", "found"), ANSWERS.items())
def test_strict_takes_what_follows_the_mark_and_flexible_the_last_number(
    text: str, found: tuple[str | None, str | None]
) -> None:
    assert (strict(text), flexible(text)) == found


MATCHES = {  # text, answer -> (strict, flexible)
    ("#### 1,600", "1600"): (True, True),
    ("#### 1600.", "1600"): (True, True),
    ("#### $1,600", "1600"): (False, True),
    ("####42", "42"): (False, True),
    ("#### 3.0", "3"): (False, True),
    ("#### 5 apples\nQuestion: 6?", "5"): (True, False),
    ("#### 5\n#### 6", "5"): (True, False),
    ("the answer is 5", "5"): (False, True),
    ("no number", "5"): (False, False),
}


@pytest.mark.parametrize(("pair", "matches"), MATCHES.items())
def test_strict_compares_characters_and_flexible_numbers(
    pair: tuple[str, str], matches: tuple[bool, bool]
) -> None:
    assert (is_strict_match(*pair), is_flexible_match(*pair)) == matches


def test_strict_is_the_strict_match_of_lm_evaluation_harness() -> None:
    """Its own filter and metric, with the settings of its own task, on random answers."""
    extraction = pytest.importorskip("lm_eval.filters.extraction")
    metrics = pytest.importorskip("lm_eval.api.metrics")
    package = Path(extraction.__file__).parents[1]
    task = yaml.safe_load((package / "tasks" / "gsm8k" / "gsm8k.yaml").read_text())
    (regex,) = (
        step
        for given in task["filter_list"]
        for step in given["filter"]
        if given["name"] == "strict-match" and step["function"] == "regex"
    )
    filtered = extraction.RegexFilter(regex["regex_pattern"])
    ignored = task["metric_list"][0]["regexes_to_ignore"]
    rng, agreed = random.Random(0), 0
    pieces = [
        "####",
        "#### ",
        "####  ",
        "$",
        "-",
        "42",
        "3",
        ".0",
        ".",
        ",",
        "1,600",
        " ",
        "\n",
        "x",
    ]
    for _ in range(3000):
        text = rng.choice(["", "#### "]) + "".join(rng.choices(pieces, k=rng.randint(1, 4)))
        answer = rng.choice(["42", "3", "1600", "-3"])
        ((found,),) = filtered.apply([[text]], [{}])
        score = metrics.exact_match_hf_evaluate(
            [found], [f"so it is\n#### {answer}"], ignored, ignore_case=True
        )
        assert is_strict_match(text, answer) == bool(score["exact_match"]), text
        agreed += bool(score["exact_match"])
    assert agreed > 30


EQUAL = {
    ("72", "72"): True,
    ("$1,600.00", "1600"): True,
    ("1600.", "1600"): True,
    ("0.5", ".5"): True,
    ("-3", "3"): False,
    ("-$3", "-3"): True,
    ("18.5", "18"): False,
    ("9" * 5000, "9"): False,
    (None, "0"): False,
}


@pytest.mark.parametrize(("pair", "equal"), EQUAL.items())
def test_numerals_are_compared_as_numbers(pair: tuple[str | None, str], equal: bool) -> None:
    assert is_equal(*pair) is equal


def test_it_works_in_threads_and_says_nothing(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The time limits of math-verify are signals, which only the main thread may set."""
    is_equal.cache_clear()
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(is_equal, ["1,024", "7", "8"], ["1024", "7", "9"])) == [
            True,
            True,
            False,
        ]
    assert capfd.readouterr().err == ""
    assert not caplog.records
