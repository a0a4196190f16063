"""Answers to word problems: likelihood of the reference, and accuracy of generated answers."""

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, lru_cache
from math import comb
from statistics import fmean
from typing import Any

from metavpt.data.gsm8k import FINAL, WordProblem
from metavpt.data.text import Document
from metavpt.data.tokens import TokenBatch
from metavpt.errors import MetaVPTError
from metavpt.learners.lm import LanguageModel
from metavpt.probes.generation import Generator
from metavpt.probes.perplexity import mean_nll
from metavpt.probes.samples import Answer
from metavpt.problem import Direction

# A sign, unless it takes away from a number; dollars; digits in groups of three or not; decimals.
NUMERAL = r"(?:(?<!\d)-)?\$?(?:\d{1,3}(?:,\d{3})+(?![\d])|\d+)(?:\.\d+)?|(?:(?<!\d)-)?\$?\.\d+"
FLEXIBLE = re.compile(NUMERAL)
# The filter "strict-match" of the task gsm8k in lm-evaluation-harness, version 3 of the task.
STRICT = re.compile(rf"{FINAL} (-?[0-9.,]+)")


def is_strict_match(text: str, answer: str) -> bool:
    """Compare a text with the answer as lm-evaluation-harness does (gsm8k, strict-match).

    The number after the first `#### ` must equal the answer as a string, except for commas and a
    final full stop. `####42`, `#### $42` and `#### 42.0` do not match 42.
    """
    given = strict(text)
    return given is not None and _exact(given) == _exact(answer)


def is_flexible_match(text: str, answer: str) -> bool:
    """Return whether the last number of the text equals the answer as a number.

    This metric is our own.
    """
    return is_equal(flexible(text), answer)


def strict(text: str) -> str | None:
    """Return the number after the first `#### `, as lm-evaluation-harness extracts it."""
    found = STRICT.search(text)
    return found[1] if found else None


def flexible(text: str) -> str | None:
    """Return the last number of the text."""
    found = FLEXIBLE.findall(_plain(text))
    return found[-1] if found else None


def _exact(number: str) -> str:
    return number.replace(",", "").removesuffix(".")


def _plain(text: str) -> str:
    """Replace the typographic minus (U+2212) by a hyphen."""
    return text.replace("\u2212", "-")


@lru_cache(maxsize=65_536)
def is_equal(given: str | None, expected: str) -> bool:
    """Return whether two numerals are the same number by math-verify, as 1,600 and $1600.00 are."""
    if given is None:
        return False
    parse, verify = _math_verify()
    return verify(parse(expected), parse(given))


@cache
def _math_verify() -> tuple[Any, Any]:
    """Return `parse` and `verify` of math-verify without their time limits.

    The limits use SIGALRM, which fails in threads. Numerals are short.
    """
    try:
        from math_verify import ExprExtractionConfig, parse, verify
    except ImportError:
        raise MetaVPTError(
            "the package math-verify, which compares answers, is missing: "
            "pip install 'metavpt[language]'"
        ) from None
    # math-verify warns that there is no time limit.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    config = [ExprExtractionConfig()]

    def read(text: str) -> Any:
        plain: Any = text.replace("$", "")
        options: Any = {"extraction_config": config, "parsing_timeout": None}
        return parse(plain, **options)

    return read, lambda a, b: verify(a, b, timeout_seconds=None)


MATCHES: dict[str, Callable[[str, str], bool]] = {  # of a text and the answer
    "strict": is_strict_match,
    "flexible": is_flexible_match,
}
NUM_SHOWN = 6


class AnswerProbe:
    """NLL of answers, and Pass@1 on word problems.

    The metrics are:

    - `nll`: the mean negative log-likelihood of an answer token, in nats.
    - `pass@1_strict`, `pass@1_flexible`: the accuracy of greedy answers by `is_strict_match` (the
      rule of lm-evaluation-harness) and by `is_flexible_match`.
    - `sampled_pass@k_strict`, `sampled_pass@k_flexible`: Pass@k of `num_samples` samples, for each
      k in `ks`. Only with `num_samples` > 0.

    Free-text answers, which no rule can compare, have `nll` alone; nothing is generated for them.

    Args:
        problems: Word problems, or documents with free-text answers.
        batches: Returns one pass over the same problems with their reference answers.
        generator: Generates the answers.
        num_samples: Samples per problem. 0: greedy answers only.
        ks: The k of Pass@k, each in 1 to `num_samples`.
        temperature: The temperature of the samples.
        seed: The seed of the samples.

    Attributes:
        answers: The first greedy answers of the last call.

    Raises:
        MetaVPTError: `ks` or `temperature` is out of range.
    """

    def __init__(
        self,
        problems: Sequence[WordProblem | Document],
        batches: Callable[[], Iterable[TokenBatch]],
        generator: Generator,
        num_samples: int = 0,
        ks: Sequence[int] = (1, 4, 16),
        temperature: float = 0.7,
        seed: int = 0,
    ) -> None:
        if num_samples and (
            temperature <= 0 or not 1 <= min(ks, default=0) <= max(ks, default=0) <= num_samples
        ):
            raise MetaVPTError(
                f"answers: ks={list(ks)} must lie in 1 to num_samples={num_samples}, and "
                f"temperature={temperature} must be positive"
            )
        self.problems = [item for item in problems if isinstance(item, WordProblem)]
        self.batches, self.generator = batches, generator
        self.num_samples, self.ks = num_samples, tuple(ks)
        self.temperature, self.seed = temperature, seed
        self.answers: list[Answer] = []

    @property
    def directions(self) -> dict[str, Direction]:
        """Return the better direction of each metric."""
        stated: dict[str, Direction] = {"nll": "lower"}
        for name in MATCHES if self.problems else ():
            stated[f"pass@1_{name}"] = "higher"
            for k in self.ks if self.num_samples else ():
                stated[f"sampled_pass@{k}_{name}"] = "higher"
        return stated

    def __call__(self, learner: LanguageModel) -> dict[str, float]:
        """Generate the answers and return the metrics by name."""
        metrics = {"nll": mean_nll(learner, self.batches())}
        if not self.problems:
            return metrics
        prompts = [self.generator.encoder.prompt(problem.question) for problem in self.problems]
        texts = self.generator(learner, prompts)
        for name in MATCHES:
            metrics[f"pass@1_{name}"] = fmean(self._right(texts, name))
        self.answers = list(self._shown(texts))
        if self.num_samples:
            repeated = [prompt for prompt in prompts for _ in range(self.num_samples)]
            metrics |= self._sampled(self.generator(learner, repeated, self.temperature, self.seed))
        return metrics

    def _sampled(self, texts: Sequence[str]) -> dict[str, float]:
        """Compute Pass@k from `num_samples` texts per problem, grouped by problem."""
        n, metrics = self.num_samples, {}
        for name in MATCHES:
            right = self._right(texts, name)
            counts = [sum(right[start : start + n]) for start in range(0, len(right), n)]
            for k in self.ks:
                metrics[f"sampled_pass@{k}_{name}"] = fmean(pass_at_k(n, c, k) for c in counts)
        return metrics

    def _right(self, texts: Sequence[str], name: str) -> list[bool]:
        repeats = len(texts) // len(self.problems)
        return [
            MATCHES[name](text, self.problems[k // repeats].answer) for k, text in enumerate(texts)
        ]

    def _shown(self, texts: Sequence[str]) -> Iterator[Answer]:
        for problem, text in zip(self.problems[:NUM_SHOWN], texts, strict=False):
            yield Answer(
                problem.question,
                problem.document.answer,
                text.strip(),
                is_flexible_match(text, problem.answer),
            )


def pass_at_k(n: int, c: int, k: int) -> float:
    """Compute 1 - C(n - c, k) / C(n, k), the chance that k of n samples hold a right one.

    The unbiased estimator of Chen et al. (arXiv 2107.03374).

    Args:
        n: The number of samples.
        c: The number of right samples.
        k: The number of samples drawn without replacement.

    Raises:
        MetaVPTError: c is not in 0 to n, or k is not in 1 to n.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise MetaVPTError(f"pass@k: k={k} must lie in 1 to n={n}, and c={c} in 0 to n")
    return 1 - comb(n - c, k) / comb(n, k)
