"""NLL, Pass@k and perplexity against what their definitions give by hand."""

import math
from itertools import combinations
from typing import Any

import pytest
import torch
from helpers.tiny_lm import dense_log_probs, packed, tiny_lm

from metavpt.data.gsm8k import WordProblem
from metavpt.errors import MetaVPTError
from metavpt.hypergradients import params
from metavpt.probes.answers import AnswerProbe, pass_at_k
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
