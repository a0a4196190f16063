"""Tokenised documents, and batches of them."""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, repeat
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from metavpt.data.lazy import Lazy, runs
from metavpt.data.loader import EndlessBatches, mix
from metavpt.data.text import Document
from metavpt.errors import MetaVPTError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT = "Question: {question}\nAnswer:"
GROUP = 256  # documents that are tokenised at once
PADDING = -1  # the document of a padding position


class TokenBatch(NamedTuple):
    """Sequences of T tokens: rows of documents or pieces of documents, padded on the right.

    Attributes:
        tokens: int64 (B, T).
        positions: int64 (B, T), from 0 in every document.
        documents: int64 (B, T), from 0 in every row, -1 for padding. Attention stays within equal
            ones.
        loss_mask: bool (B, T), True where a token is a target, predicted from the earlier tokens of
            its document. The first token of a document never is.
        seed: The seed of all randomness in the task.
        domain: int64 (B,), the domain of each row.
    """

    tokens: Tensor
    positions: Tensor
    documents: Tensor
    loss_mask: Tensor
    seed: int
    domain: Tensor

    def to(self, device: torch.device | str) -> "TokenBatch":
        """Move the tensors to a device."""
        return tree_map(
            lambda part: part.to(device, non_blocking=True) if isinstance(part, Tensor) else part,
            self,
        )


class Encoded(NamedTuple):
    """Tokens int32 (n,) of a document or a piece; the first `num_prompt` are not targets."""

    tokens: np.ndarray
    num_prompt: int


def prompt_of(question: str, prompt: str = PROMPT) -> str:
    """What a model is given to answer `question`; nothing for plain text."""
    return prompt.format(question=question) if question else ""


def text_of(document: Document, prompt: str = PROMPT) -> str:
    """The whole of a document as it is tokenised."""
    return (
        f"{prompt_of(document.question, prompt)} {document.answer}"
        if document.question
        else document.answer
    )


class Encoder:
    """Tokenises documents to `Encoded`s of at most `length` tokens.

    A document is the prompt with the question, the answer and EOS. Plain text has no prompt. A
    special token that is spelt out in a document is text.

    Args:
        tokenizer: The tokenizer.
        length: The limit.
        long: A longer document is "split" into pieces that share one token, so that each token is a
            target exactly once; or "cut" after `length` tokens, and `cut` lists it.
        on_error: A prompt of `length` tokens or more leaves no room for an answer. "raise": an
            error with its file and line. "skip": the document is left out, and `skipped` lists it.
        prompt: The format of the prompt.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        length: int,
        long: str = "split",
        on_error: str = "raise",
        prompt: str = PROMPT,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise MetaVPTError(
                f"{tokenizer.name_or_path or 'tokenizer'}: no EOS token, which ends every "
                "document; set its eos_token"
            )
        if (
            length < 2
            or long not in ("split", "cut")
            or on_error not in ("raise", "skip")
            or "{question}" not in prompt
        ):
            raise MetaVPTError(
                f"tokens: length={length} must be 2 or more, long={long!r} 'split' or 'cut', "
                f"on_error={on_error!r} 'raise' or 'skip', "
                f"and prompt={prompt!r} must hold {{question}}"
            )
        self.tokenizer, self.length, self.long, self.on_error, self.template = (
            tokenizer,
            length,
            long,
            on_error,
            prompt,
        )
        self.eos = int(tokenizer.eos_token_id)  # type: ignore[arg-type]
        self.skipped: dict[str, str] = {}
        self.cut: dict[str, int] = {}

    @property
    def pad(self) -> int:
        """Return the padding token."""
        own = self.tokenizer.pad_token_id
        return self.eos if own is None else int(own)  # type: ignore[arg-type]

    def prompt(self, question: str) -> str:
        """Return the prompt for `question`, whose tokens begin those of the whole document."""
        return prompt_of(question, self.template)

    def __call__(self, documents: Iterable[Document]) -> Iterator[Encoded]:
        """Iterate over the tokenised documents."""
        iterator = iter(documents)
        while group := list(islice(iterator, GROUP)):
            prompts = [self.prompt(document.question) for document in group]
            texts = [text_of(document, self.template) for document in group]
            encoded = self.tokenizer(
                texts,
                return_offsets_mapping=True,
                return_attention_mask=False,
                split_special_tokens=True,
                verbose=False,
            )
            for document, prompt, ids, spans in zip(
                group, prompts, encoded["input_ids"], encoded["offset_mapping"], strict=True
            ):  # type: ignore[arg-type]
                num_prompt = next(
                    (k for k, (_, end) in enumerate(spans) if end > len(prompt)), len(spans)
                )
                tokens = ids if ids[-1:] == [self.eos] else [*ids, self.eos]
                yield from self._pieces(
                    Encoded(np.array(tokens, dtype=np.int32), num_prompt), document.where
                )

    def _pieces(self, whole: Encoded, where: str) -> Iterator[Encoded]:
        tokens, num_prompt = whole
        if num_prompt >= self.length:
            reason = f"the prompt has {num_prompt} tokens, which leaves no room for an answer in "
            reason += f"{self.length}"
            if self.on_error == "raise":
                raise MetaVPTError(
                    f"{where or 'document'}: {reason}; raise the length, or leave it out "
                    "(on_error=skip, if it is no test problem)"
                )
            self.skipped[where] = reason
        elif len(tokens) <= self.length:
            yield whole
        elif self.long == "cut":
            self.cut[where] = len(tokens) - self.length
            yield Encoded(tokens[: self.length], num_prompt)
        else:
            for first in range(0, len(tokens) - 1, self.length - 1):
                yield Encoded(tokens[first : first + self.length], max(num_prompt - first, 0))


class Corpus:
    """Tokenised documents held in memory."""

    def __init__(self, documents: Iterable[Encoded], name: str = "corpus") -> None:
        tokens, ends, num_prompt = array("i"), array("q", [0]), array("i")
        for document in documents:
            tokens.frombytes(document.tokens.tobytes())
            ends.append(len(tokens))
            num_prompt.append(document.num_prompt)
        if not num_prompt:
            raise MetaVPTError(
                f"{name}: no document is left to train on; name a source with documents that fit"
            )
        self.tokens, self.ends, self.num_prompt = (
            np.frombuffer(tokens, np.int32),
            np.frombuffer(ends, np.int64),
            num_prompt,
        )
        self._whole: TokenBatch | None = None

    def __len__(self) -> int:
        return len(self.num_prompt)

    def __getitem__(self, k: int) -> Encoded:
        return Encoded(self.tokens[self.ends[k] : self.ends[k + 1]], self.num_prompt[k])

    def draw(self, seed: int) -> Iterator[Encoded]:
        """Every document once, in an order set by `seed`."""
        return map(
            self.__getitem__,
            torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist(),
        )

    def whole(self, pad: int, domain: int, device: torch.device | str) -> "TokenBatch":
        """Every document as a row of one batch: the same tensors at every call."""
        if self._whole is None:
            documents = [self[k] for k in range(len(self))]
            self._whole = one_per_row(documents, pad, 0, domain).to(device)
        return self._whole


def collate(
    rows: Sequence[Sequence[Encoded]], length: int, pad: int, seed: int, domains: Sequence[int]
) -> TokenBatch:
    """One row of the batch for the documents in each of `rows`, which must fit into `length`."""
    shape = (len(rows), length)
    tokens, positions = np.full(shape, pad, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    documents, loss_mask = np.full(shape, PADDING, dtype=np.int64), np.zeros(shape, dtype=np.bool_)
    for b, row in enumerate(rows):
        start = 0
        for index, document in enumerate(row):
            end = start + len(document.tokens)
            tokens[b, start:end] = document.tokens
            positions[b, start:end] = np.arange(end - start)
            documents[b, start:end] = index
            loss_mask[b, start + max(document.num_prompt, 1) : end] = True
            start = end
    return TokenBatch(
        *map(torch.from_numpy, (tokens, positions, documents, loss_mask)),
        seed=seed,
        domain=torch.tensor(domains),
    )


def one_per_row(documents: Sequence[Encoded], pad: int, seed: int, domain: int) -> TokenBatch:
    """A row of the batch for each document, padded to the longest."""
    length = max(len(document.tokens) for document in documents)
    rows = [[document] for document in documents]
    return collate(rows, length, pad, seed, [domain] * len(rows))


class ExampleLoader:
    """Endless batches of documents, one per row, padded to the longest of the batch.

    With `batch_size` None each batch is the whole corpus, in order, in the same tensors.
    """

    def __init__(
        self,
        corpus: Corpus,
        batch_size: int | None,
        seed: int,
        pad: int,
        domain: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        if batch_size is not None and not 1 <= batch_size <= len(corpus):
            raise MetaVPTError(
                f"problem.feedback_batch_size={batch_size} must be at least 1 and at most the "
                f"{len(corpus)} feedback documents"
            )
        self.corpus, self.batch_size, self.seed, self.pad, self.domain, self.device = (
            corpus,
            batch_size,
            seed,
            pad,
            domain,
            device,
        )
        self.first = 0

    def skip(self, num_batches: int) -> None:
        """Start at batch `num_batches`, without making those before it."""
        self.first = num_batches

    def __iter__(self) -> Iterator[TokenBatch]:
        if self.batch_size is None:
            yield from repeat(self.corpus.whole(self.pad, self.domain, self.device))
            return
        for k, indices in enumerate(
            EndlessBatches(len(self.corpus), self.batch_size, self.seed, self.first),
            start=self.first,
        ):
            yield self._batch(indices, mix(self.seed, k))

    def in_order(self) -> Lazy[tuple[int, Sequence[int]], TokenBatch]:
        """One pass; the last batch may be smaller."""
        size = self.batch_size or len(self.corpus)
        numbered = list(enumerate(runs(range(len(self.corpus)), size)))
        return Lazy(lambda batch: self._batch(batch[1], mix(self.seed, batch[0])), numbered)

    def _batch(self, indices: Sequence[int], seed: int) -> TokenBatch:
        documents = [self.corpus[k] for k in indices]
        return one_per_row(documents, self.pad, seed, self.domain).to(self.device)
