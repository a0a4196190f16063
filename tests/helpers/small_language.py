"""The language problem at its smallest, as options and made of them."""

from contextlib import contextmanager

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

SUMS = "{min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 1}"
SMALL = [
    "problem=lm_gsm8k", "learner.vocab_size=270", "learner.tail_layers=1", "learner.hidden_size=16",
    "learner.intermediate_size=24",
    "learner.num_hidden_layers=2", "learner.num_attention_heads=2", "designer.width=8",
    "designer.num_layers=1", "designer.num_heads=2",
    f"data.stream.sums.documents.kinds.chain_sum={SUMS}",
    f"+data.stream.stories.documents.kinds.chain_sum={SUMS}",
    "~data.stream.stories.documents.kinds.gsm_symbolic",
    "data.feedback.math.limit=10", "data.test.answers.limit=4", "data.general.stories.limit=3",
    "data.num_feedback=6", "data.num_held_out=4", "data.num_test=4", "data.num_general=3",
    "problem.generator.max_new_tokens=4",
    "problem.length=64", "problem.batch_size=2", "problem.meta_batch_size=2",
    "problem.feedback_batch_size=3",
]  # fmt: skip
TARGETS = ["designer.num_candidates=6"]  # of the designer of targets
TWO_DOMAINS = [
    "+data.stream.stories.domain=other",
    "+data.feedback.other=${data.feedback.math}",
]


@contextmanager
def fresh_problems(tmp_path_factory):
    """fresh(*overrides, seed=0) -> a new problem. Tokenizers are trained once per combination."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAVPT_CACHE", str(tmp_path_factory.mktemp("tokenizers")))

        def fresh(*overrides, seed=0):
            torch.manual_seed(seed)
            return instantiate(composed(*overrides).problem, _convert_="all")

        yield fresh


def composed(*overrides):
    with initialize_config_module("metavpt.configs", version_base="1.3"):
        designer = [] if "designer=token_weights" in overrides else TARGETS
        has_no_body = "designer=states" in overrides
        small = [option for option in SMALL if not (has_no_body and option.startswith("designer."))]
        return compose("run", [*small, *designer, *overrides])


def in_float64(problem):
    """The problem in float64, its designer away from the identity at which it starts."""
    problem.learner.double()
    problem.designer.double()
    torch.manual_seed(1)
    with torch.no_grad():
        for p in problem.designer.parameters():
            p.add_(0.1 * torch.randn_like(p))
        problem.designer.gate.bias.fill_(0.5)
    return problem
