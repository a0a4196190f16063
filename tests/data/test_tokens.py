from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves

from metavpt.data.text import Document
from metavpt.data.tokens import Corpus, Encoded, Encoder, ExampleLoader, TokenBatch, collate
from metavpt.errors import MetaVPTError

DOCUMENTS = [
    Document("What is 2 + 40?", "2 + 40 = 42\n#### 42"),
    Document("", "Plain text, é 山."),
    Document("Why?", "Because.\n\n  So."),
]
MANY = [Document(f"What is {k} + 1?", f"#### {k + 1}", f"line {k}") for k in range(23)]


class Spliced:
    """A tokenizer with an attribute replaced."""

    def __init__(self, tokenizer: Any, **attributes: Any) -> None:
        self.tokenizer = tokenizer
        self.__dict__.update(attributes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.tokenizer(*args, **kwargs)


def test_documents_are_prompt_answer_and_eos(tokenizer: Any):
    encoder = Encoder(tokenizer, 256)
    for document, (tokens, num_prompt) in zip(DOCUMENTS, encoder(DOCUMENTS), strict=True):
        prompt = encoder.prompt(document.question)
        assert tokens[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(tokens[:num_prompt]) == prompt
        assert tokenizer.decode(tokens[num_prompt:-1]) == (
            f" {document.answer}" if prompt else document.answer
        )
        assert (
            tokens[:num_prompt].tolist() == tokenizer(prompt)["input_ids"]
        )  # what a model is given when it is to answer
    assert encoder.prompt("Why?") == "Question: Why?\nAnswer:"


def test_bos_is_kept_and_is_no_target(tokenizer: Any):
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = TemplateProcessing(
        single="<|pad|> $A <|endoftext|>", special_tokens=[("<|pad|>", 1), ("<|endoftext|>", 0)]
    )
    marked = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|pad|>", eos_token="<|endoftext|>"
    )
    for plain, (tokens, num_prompt) in zip(
        Encoder(tokenizer, 256)(DOCUMENTS), Encoder(marked, 256)(DOCUMENTS), strict=True
    ):
        assert tokens.tolist() == [1, *plain.tokens]  # one EOS, not two
        assert num_prompt == plain.num_prompt + 1


def test_special_tokens_in_a_document_are_text(tokenizer: Any):
    ((tokens, _),) = Encoder(tokenizer, 256)([Document("", "an <|endoftext|> inside")])
    assert (tokens == tokenizer.eos_token_id).tolist() == [False] * (len(tokens) - 1) + [True]


def test_a_tokenizer_without_eos_is_an_error(tokenizer: Any):
    with pytest.raises(MetaVPTError, match="no EOS token"):
        Encoder(Spliced(tokenizer, eos_token_id=None), 256)  # type: ignore[arg-type]
    assert Encoder(Spliced(tokenizer, pad_token_id=None), 256).pad == tokenizer.eos_token_id
    for options in ({"length": 1}, {"long": "drop"}, {"on_error": "no"}, {"prompt": "Q:"}):
        with pytest.raises(MetaVPTError, match="tokens: length="):
            Encoder(tokenizer, **{"length": 8, **options})


@pytest.mark.parametrize("room", [1, 2, 3, 7, 9, 30])
def test_long_documents_split_or_cut(room: int, tokenizer: Any):
    document = Document("Why?", "because " * 30, "a.txt, line 7")
    ((whole, num_prompt),) = Encoder(tokenizer, 10_000)([document])
    length = num_prompt + room
    pieces = list(Encoder(tokenizer, length)([document]))
    assert all(len(piece.tokens) <= length for piece in pieces)
    assert (
        np.concatenate([pieces[0].tokens, *(piece.tokens[1:] for piece in pieces[1:])]).tolist()
        == whole.tolist()
    )
    targets = [piece.tokens[max(piece.num_prompt, 1) :] for piece in pieces]
    assert np.concatenate(targets).tolist() == whole[num_prompt:].tolist()
    cutting = Encoder(tokenizer, length, long="cut")
    ((tokens, kept_prompt),) = cutting([document])
    assert (tokens.tolist(), kept_prompt) == (whole[:length].tolist(), num_prompt)
    assert cutting.cut == {"a.txt, line 7": len(whole) - length}


def test_a_prompt_longer_than_the_context(tokenizer: Any):
    documents = [
        Document("why " * 50, "So.", "a.jsonl, line 3"),
        Document("Why?", "So.", "a.jsonl, line 4"),
    ]
    for long in ("split", "cut"):
        with pytest.raises(
            MetaVPTError,
            match=r"a\.jsonl, line 3: the prompt has \d+ tokens, .* in 40; .*on_error=skip",
        ):
            list(Encoder(tokenizer, 40, long)(documents))
        encoder = Encoder(tokenizer, 40, long, on_error="skip")
        assert len(list(encoder(documents))) == 1
        assert list(encoder.skipped) == ["a.jsonl, line 3"]


def test_corpus_holds_every_document_and_draws_it_once(tokenizer: Any):
    encoded = list(Encoder(tokenizer, 64)(MANY))
    corpus = Corpus(encoded)
    assert len(corpus) == len(MANY)
    for k, document in enumerate(encoded):
        assert corpus[k].tokens.tolist() == document.tokens.tolist()
        assert corpus[k].num_prompt == document.num_prompt

    def order(seed: int) -> list[tuple[int, ...]]:
        return [tuple(document.tokens.tolist()) for document in corpus.draw(seed)]

    assert order(1) == order(1) != order(2)
    assert (
        sorted(order(1))
        == sorted(order(2))
        == sorted(tuple(document.tokens.tolist()) for document in encoded)
    )
    with pytest.raises(MetaVPTError, match="feedback: no document is left"):
        Corpus([], "feedback")


def test_collate_by_hand():
    first, second = (
        Encoded(np.array([5, 6, 7], dtype=np.int32), 2),
        Encoded(np.array([8, 9], dtype=np.int32), 0),
    )
    batch = collate([[first, second], [second]], 6, pad=1, seed=3, domains=[0, 2])
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 9, 1], [8, 9, 1, 1, 1, 1]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 0, 0, 0, 0]]
    assert batch.documents.tolist() == [[0, 0, 0, 1, 1, -1], [0, 0, -1, -1, -1, -1]]
    assert batch.loss_mask.int().tolist() == [[0, 0, 1, 0, 1, 0], [0, 1, 0, 0, 0, 0]]
    assert (batch.seed, batch.domain.tolist()) == (3, [0, 2])
    moved = batch.to("meta")
    assert isinstance(moved, TokenBatch)
    assert moved.tokens.device.type == "meta"
    assert moved.seed == 3
    assert len(tree_leaves(batch)) == 6


@pytest.mark.parametrize("first", [0, 1, 5, 40])
def test_examples_skip_to_the_uninterrupted_order(first: int, tokenizer: Any):
    encoder = Encoder(tokenizer, 64)
    corpus = Corpus(encoder(MANY))
    whole = list(islice(ExampleLoader(corpus, 4, 7, encoder.pad), first + 3))
    resumed = ExampleLoader(corpus, 4, 7, encoder.pad)
    resumed.skip(first)
    for expected, batch in zip(whole[first:], islice(resumed, 3), strict=True):
        assert all(
            torch.equal(torch.as_tensor(a), torch.as_tensor(b))
            for a, b in zip(expected, batch, strict=True)
        )


def test_examples_are_whole_documents(tokenizer: Any):
    encoder = Encoder(tokenizer, 64)
    loader = ExampleLoader(Corpus(encoder(MANY)), 4, 0, encoder.pad, domain=2)
    batches = list(loader.in_order())
    assert [len(batch.tokens) for batch in batches] == [4, 4, 4, 4, 4, 3]
    answers = [
        tokenizer.decode(row[mask][:-1])
        for batch in batches
        for row, mask in zip(batch.tokens, batch.loss_mask, strict=True)
    ]
    assert answers == [f" #### {k + 1}" for k in range(23)]
    for batch in batches:
        assert (batch.documents >= 0).sum(1).max() == batch.tokens.shape[
            1
        ]  # padded to the longest, not further
        assert (batch.tokens[batch.documents < 0] == encoder.pad).all()
        assert batch.domain.tolist() == [2] * len(batch.tokens)
    for size in (0, 24):
        with pytest.raises(
            MetaVPTError, match=rf"feedback_batch_size={size} .* the 23 feedback documents"
        ):
            ExampleLoader(loader.corpus, size, 0, encoder.pad)
