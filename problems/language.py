"""The base of language problems: the packed stream, feedback from examples, probes and texts."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from metavpt.data.language import LanguageData, by_length, join, rows_of
from metavpt.data.tokens import PADDING, Corpus, ExampleLoader, TokenBatch
from metavpt.distributed import collectives
from metavpt.distributed.fsdp import Shardable
from metavpt.errors import MetaVPTError
from metavpt.feedback.aggregation import MultipleFeedbacks, SplitsDomains
from metavpt.feedback.cross_fitted import in_parts
from metavpt.hypergradients import params
from metavpt.hypergradients.params import Params
from metavpt.learners.lm import Hidden, LanguageModel
from metavpt.learners.tokenized import TokenizedModel
from metavpt.learners.trunk_states import TrunkStates
from metavpt.objectives.prediction import predicted_tokens
from metavpt.objectives.target_task import OneHot, TargetTask, own_target_loss, target_loss
from metavpt.probes.answers import AnswerProbe
from metavpt.probes.generation import Generator
from metavpt.probes.passages import passages
from metavpt.probes.perplexity import PerplexityProbe
from metavpt.probes.samples import Texts
from metavpt.problem import Problem
from metavpt.training.run_log import Reportable


class LanguageProblem(MultipleFeedbacks, SplitsDomains, Shardable, Reportable, Problem):
    """A causal language model reads a stream of text, and answers held-out questions.

    A subclass adds the designer and the loss.

    Args:
        length: Tokens of a row of the stream, and the limit for an example.
        batch_size: Rows of a step.
        meta_batch_size: Rows of a designer update.
        feedback_batch_size: Examples of each domain for g_down. None: all of them.
        feedback_weights: By domain of `data.feedback`. None: 1 for each.
        generator: Generates the answers to the test problems.
        answers: Scores the answers.
        probe_batch_size: Examples per forward pass of a probe, and of feedback from more of them.
        trunk_tolerance: With `feedback_batch_size` None, trunk states of the examples are reused
            while the trunk has moved by less, relative to its norm, see `TrunkStates`. They take
            4 (D + 2 D / heads) bytes per token in float32: 460 MB for 1,024 GSM8K answers and
            SmolLM2-135M.
    """

    learner: LanguageModel

    def __init__(
        self,
        learner: Callable[[Iterable[str]], TokenizedModel],
        data: LanguageData,
        generator: Callable[..., Generator] = Generator,
        answers: Callable[..., AnswerProbe] = AnswerProbe,
        length: int = 512,
        batch_size: int = 16,
        meta_batch_size: int = 8,
        feedback_batch_size: int | None = 16,
        feedback_weights: Mapping[str, float] | None = None,
        probe_batch_size: int = 32,
        trunk_tolerance: float = 0.0,
    ) -> None:
        self.learner, tokenizer = learner(data.texts())
        if length > self.learner.max_length:
            raise MetaVPTError(
                f"problem.length={length} is longer than the model's context of "
                f"{self.learner.max_length} tokens"
            )
        self.data = data.encode(tokenizer, length)
        self.batch_size, self.meta_batch_size, self.feedback_batch_size = (
            batch_size,
            meta_batch_size,
            feedback_batch_size,
        )
        self.probe_batch_size = probe_batch_size
        self.trunk_states = TrunkStates(trunk_tolerance)
        self.feedback_record: dict[str, float] = {}
        self.feedback_weights = dict(feedback_weights or dict.fromkeys(self.data.feedback, 1.0))
        answered = partial(answers, generator=generator(self.data.encoder))
        self.answers = {
            name: answered(found, self._in_order(self.data.test[name]))
            for name, found in self.data.problems.items()
        }
        self.perplexities = {
            name: PerplexityProbe(self._in_order(corpus))
            for name, corpus in self.data.general.items()
        }
        probes: dict[str, AnswerProbe | PerplexityProbe] = {**self.answers, **self.perplexities}
        self.metric_directions = {
            f"{name}/{metric}": direction
            for name, probe in probes.items()
            for metric, direction in probe.directions.items()
        }
        self.last_task: TargetTask | None = None

    @property
    def device(self) -> torch.device:
        """Return the learner's device."""
        return next(self.learner.parameters()).device

    @override
    def pretrain_batches(self, seed: int) -> Iterable[Any]:
        return self.data.packed(self.batch_size, seed, self.device)

    def meta_batches(self, seed: int) -> Iterable[Any]:
        """Return unlabelled batches for the designer's updates."""
        return self.data.packed_by_domain(self.meta_batch_size, seed, self.device)

    @override
    def feedback_batches(self, seed: int) -> Iterable[Any]:
        return self.data.examples(self.data.feedback, self.feedback_batch_size, seed, self.device)

    def held_out_batches(self, seed: int) -> Iterable[Any]:
        """Return labelled batches that no designer update reads."""
        return self.data.examples(self.data.held_out, self.feedback_batch_size, seed, self.device)

    @override
    def by_domain(self, batch: TokenBatch) -> dict[str, TokenBatch]:
        rows = {
            name: batch.domain == self.data.domains.index(name)
            for name in self.feedback_weights
            if name in self.data.domains
        }
        return {name: rows_of(batch, which) for name, which in rows.items() if which.any()}

    @override
    def aligned_parameters(self) -> list[str]:
        return self.learner.aligned_parameters()

    @override
    def trunks(self) -> list[nn.Module]:
        return [self.learner.trunk]

    def whole_parameters(self) -> list[str]:
        """The embedding, where it is the unembedding too."""
        return ["embed_tokens.weight"] if self.learner.tied else []

    def feedback_losses(self, theta: Params, batch: Mapping[str, TokenBatch]) -> dict[str, Tensor]:
        """NLL of an answer token, by domain."""
        return {name: self._answer_loss(theta, name, examples) for name, examples in batch.items()}

    def _answer_loss(self, theta: Params, name: str, examples: TokenBatch) -> Tensor:
        """Compute the mean over the answer tokens, with the memory of one microbatch."""
        if len(examples.tokens) <= self.probe_batch_size:
            return target_loss(self.learner, theta, TargetTask(examples, OneHot()))
        parts, trunk = by_length(examples, self.probe_batch_size), params.subset(theta, "trunk.")
        hidden: list[Hidden | None] = [None] * len(parts)
        if not any(p.requires_grad for p in trunk.values()):
            key = None if self.feedback_batch_size else (name, examples.tokens.data_ptr())
            hidden = self.trunk_states(self.learner.trunk, trunk, key, lambda: parts)

        def total(own: Params, k: int) -> Tensor:
            task = TargetTask(parts[k], OneHot())
            loss, num_tokens = own_target_loss(self.learner, own, task, hidden[k])
            return (num_tokens * loss)[None]

        num_tokens = int(predicted_tokens(examples).sum())
        totals = in_parts(total, theta, range(len(parts)), self.feedback_record)
        return collectives.weighed(totals.sum() / num_tokens, num_tokens)

    def pick(self, tasks: Sequence[TargetTask], which: Tensor, sample: Tensor) -> TargetTask:
        """Rows of several batches as one, with the targets of the first."""
        picked = [
            rows_of(tasks[k].batch, n[None]) for k, n in zip(which.tolist(), sample, strict=True)
        ]
        return TargetTask(join(picked), tasks[0].targets)

    def microbatches(self, task: TargetTask, num_parts: int) -> list[TargetTask]:
        """Split a task by rows."""
        rows = torch.arange(len(task.batch.tokens), device=task.batch.tokens.device).chunk(
            num_parts
        )
        return [
            TargetTask(rows_of(task.batch, own), _targets_of(task.targets, own)) for own in rows
        ]

    def num_samples(self, batch: TokenBatch) -> int:
        """Tokens, without padding."""
        return int((batch.documents != PADDING).sum())

    def is_target_metric(self, metric: str) -> bool:
        """Answers to word problems are; the perplexity of general text is a side effect."""
        return metric.partition("/")[0] in self.answers

    @override
    def after_step(self, task: TargetTask, progress: float) -> None:
        self.last_task = task

    @override
    def evaluate(self) -> dict[str, float]:
        probes = {**self.answers, **self.perplexities}
        return {
            f"{name}/{metric}": value
            for name, probe in probes.items()
            for metric, value in probe(self.learner).items()
        }

    def texts(self) -> Texts:
        """Return the last task's designed targets, and the answers of the last `evaluate`."""
        task, tokenizer = self.last_task, self.data.encoder.tokenizer
        shown = (
            passages(self.learner, tokenizer, task)
            if task is not None and not isinstance(task.targets, OneHot)
            else []
        )
        return Texts(shown, [answer for probe in self.answers.values() for answer in probe.answers])

    def trivial_metrics(self) -> dict[str, dict[str, float]]:
        """Score predictions that ignore the context.

        `uniform tokens` gives all tokens of the vocabulary one probability, `unigram` their
        frequencies in the answers of the feedback, each counted once more than it occurs.
        """
        size = self.learner.vocab_size
        uniform = {f"{name}/nll": math.log(size) for name in self.answers}
        uniform |= {f"{name}/perplexity": float(size) for name in self.perplexities}
        counts = torch.ones(size, dtype=torch.float64)
        for corpus in self.data.feedback.values():
            counts += self._token_counts(corpus)
        nll = -(counts / counts.sum()).log()
        unigram: dict[str, float] = {}
        for name in self.answers:
            found = self._token_counts(self.data.test[name])
            unigram[f"{name}/nll"] = float((found * nll).sum() / found.sum())
        return {"uniform tokens": uniform, "unigram": unigram}

    def _token_counts(self, corpus: Corpus) -> Tensor:
        """Count how often each token of the vocabulary is to be predicted, float64 (V,)."""
        counts = torch.zeros(self.learner.vocab_size, dtype=torch.float64)
        for batch in self._in_order(corpus)():
            tokens = batch.tokens[predicted_tokens(batch)].cpu()
            counts += torch.bincount(tokens, minlength=len(counts))
        return counts

    def _in_order(self, corpus: Corpus) -> Callable[[], Iterable[TokenBatch]]:
        size = min(self.probe_batch_size, len(corpus))
        return lambda: ExampleLoader(
            corpus, size, 0, self.data.encoder.pad, device=self.device
        ).in_order()


def _targets_of(targets: Any, rows: Tensor) -> Any:
    """The targets of some rows of their batch."""
    by_row = {
        name: part
        for name in ("gate", "vectors", "excess", "weights")
        if isinstance(part := getattr(targets, name, None), Tensor)
    }
    return (
        replace(targets, **{name: part[rows] for name, part in by_row.items()})
        if by_row
        else targets
    )
