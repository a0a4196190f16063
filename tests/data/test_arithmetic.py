import random
import re
from itertools import islice

import pytest

from metavpt.data.arithmetic import CHAINS, PARTS, Arithmetic, part_of
from metavpt.errors import MetaVPTError

BOTH = {"chain_sum": {"weight": 3, **CHAINS}, "gsm_symbolic": {"weight": 1}}


def test_parts_share_no_question():
    """Also for neighbouring seeds, which reasoning-gym maps to the same problems shifted by one."""
    questions = {
        part: {p.question for p in Arithmetic(part, BOTH, seed, 300).problems()}
        for seed, part in enumerate(PARTS)
    }
    assert all(len(found) == 300 for found in questions.values())
    assert not questions["stream"] & questions["feedback"]
    assert not questions["stream"] & questions["test"]
    assert not questions["feedback"] & questions["test"]
    assert all(part_of(question) == part for part, found in questions.items() for question in found)


def test_steps_of_chains_are_true_and_end_in_the_answer():
    for problem in Arithmetic("stream", limit=500).problems():
        expression = problem.question.removeprefix("What is ").removesuffix("?")
        assert eval(expression) == int(problem.answer)
        steps = problem.solution.split("\n")
        for step in steps:
            left, right = step.split(" = ")
            assert eval(left) == int(right)
        assert len(steps) == len(re.findall(r" [+-] ", expression))
        assert steps[-1].split(" = ")[1] == problem.answer
        assert problem.document.answer.endswith(f"\n#### {problem.answer}")


def test_difficulty_is_set_by_the_options():
    options = {"min_terms": 5, "max_terms": 5, "min_digits": 3, "max_digits": 3}
    for problem in Arithmetic("stream", {"chain_sum": options}, limit=100).problems():
        assert [len(number) for number in re.findall(r"\d+", problem.question)] == [3] * 5


def test_symbolic_problems_have_steps_and_one_final_line():
    for document in Arithmetic("feedback", {"gsm_symbolic": {}}, limit=200):
        assert "final answer" not in document.question
        assert re.fullmatch(r".+\n#### -?\d+(\.\d+)?", document.answer, flags=re.S)
        assert document.answer.count("####") == 1


def test_generators_without_steps_have_the_answer_alone():
    for document in Arithmetic("stream", {"gcd": {}}, limit=20):
        assert re.fullmatch(r"#### \d+", document.answer)


def test_order_depends_on_the_seed_alone():
    source = Arithmetic("stream", BOTH, seed=4)
    state = random.getstate()
    first, again, other = (list(islice(source.draw(seed), 200)) for seed in (4, 4, 5))
    assert random.getstate() == state
    assert first == again == list(islice(source, 200))
    assert not {document.question for document in first if "What is" not in document.question} & {
        document.question for document in other
    }


def test_weights_are_shares():
    chains = [
        problem.question.startswith("What is")
        for problem in islice(Arithmetic("stream", BOTH).problems(), 2000)
    ]
    assert abs(sum(chains) / 2000 - 0.75) < 0.04


def test_an_endless_stream_goes_on_past_a_block():
    problems = islice(Arithmetic("stream", {"chain_sum": {}}).problems(), 9000)
    assert len({problem.where for problem in problems}) == 9000


def test_bad_options():
    with pytest.raises(MetaVPTError, match="part='train' must be one of stream, feedback, test"):
        Arithmetic("train")
    with pytest.raises(MetaVPTError, match=r"arithmetic\.kinds\.chain_sums"):
        Arithmetic("test", {"chain_sums": {}})
    with pytest.raises(MetaVPTError, match=r"arithmetic\.kinds\.chain_sum: .*max_termss"):
        Arithmetic("test", {"chain_sum": {"max_termss": 3}})
    with pytest.raises(MetaVPTError, match=r"arithmetic\.kinds\.chain_sum: max_terms must be"):
        Arithmetic("test", {"chain_sum": {"min_terms": 3, "max_terms": 2}})
    with pytest.raises(MetaVPTError, match="must not be negative"):
        Arithmetic("test", {"chain_sum": {"weight": -1}})


def test_too_few_problems_are_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("metavpt.data.arithmetic.MAX_REPEATS", 5000)
    small = {"chain_sum": {"min_terms": 2, "max_terms": 2, "max_digits": 1}}
    with pytest.raises(
        MetaVPTError, match=r"'test' of chain_sum has but \d+ different problems, not 100"
    ):
        list(Arithmetic("test", small, limit=100))
    monkeypatch.setattr("metavpt.data.arithmetic.part_of", lambda question: "stream")
    with pytest.raises(
        MetaVPTError, match=r"kinds\.chain_sum: no problem falls into the part 'test'"
    ):
        list(Arithmetic("test", small, limit=100))
