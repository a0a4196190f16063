from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from metavpt.data.arithmetic import Arithmetic
from metavpt.data.mixture import Component, Generated, PackedLoader, Packer, ShuffleBuffer
from metavpt.data.text import Document
from metavpt.data.tokens import Corpus, Encoded, Encoder, TokenBatch, collate
from metavpt.errors import MetaVPTError
from metavpt.training.streams import Stream

LENGTH = 64


def texts(word: str, num_documents: int) -> list[Document]:
    return [Document(f"What is {word} {k}?", "so " * (k % 13 + 1)) for k in range(num_documents)]


def equal(first: TokenBatch, second: TokenBatch) -> bool:
    pairs = zip(first, second, strict=True)
    return all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
        for a, b in pairs
    )


def rows_of(batches: Iterable[TokenBatch]) -> Iterator[tuple[int, Tensor, Tensor]]:
    for batch in batches:
        yield from zip(batch.domain.tolist(), batch.tokens, batch.documents, strict=True)


def documents_of(batches: Iterable[TokenBatch]) -> Counter[tuple[int, ...]]:
    """The tokens of every document in the batches, with how often it came."""
    return Counter(
        tuple(tokens[ids == k].tolist())
        for _, tokens, ids in rows_of(batches)
        for k in range(int(ids.max()) + 1)
        if (ids == k).any()
    )


@pytest.fixture
def encoder(tokenizer: Any) -> Encoder:
    return Encoder(tokenizer, LENGTH)


@pytest.fixture
def components(encoder: Encoder) -> list[Component]:
    return [
        Component(Corpus(encoder(texts("cat", 40))), 2.0, "held"),
        Component(ShuffleBuffer(texts("dog", 30), encoder, size=7), 1.0, "read"),
        Component(Generated(Arithmetic("stream"), encoder), 1.0, "made"),
    ]


@pytest.mark.parametrize("first", [0, 1, 9, 60])
def test_skip_is_the_uninterrupted_order(first: int, components: list[Component], encoder: Encoder):
    """60 batches of 4 rows go through every finite source several times."""
    whole = list(islice(PackedLoader(components, LENGTH, 4, 11, encoder.pad), first + 4))
    resumed = PackedLoader(components, LENGTH, 4, 11, encoder.pad)
    resumed.skip(first)
    assert all(equal(a, b) for a, b in zip(whole[first:], islice(resumed, 4), strict=True))
    assert not equal(whole[first], next(iter(PackedLoader(components, LENGTH, 4, 12, encoder.pad))))


def test_a_stream_resumes_across_the_end_of_its_source(encoder: Encoder):
    component = Component(Corpus(encoder(texts("cat", 40))), max_epochs=1)

    def stream() -> Stream:
        return Stream(lambda seed: PackedLoader([component], LENGTH, 3, seed, encoder.pad), seed=5)

    one = stream()
    for _ in range(17):
        next(one)
    assert one.epoch > 0
    other = stream()
    other.load_state_dict(one.state_dict())
    assert all(equal(next(one), next(other)) for _ in range(12))


def test_skip_makes_no_tensor_of_what_comes_before(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
):
    made = []

    def counting(*arguments: Any) -> TokenBatch:
        made.append(arguments)
        return collate(*arguments)

    monkeypatch.setattr("metavpt.data.mixture.collate", counting)
    loader = PackedLoader([Component(Corpus(encoder(texts("cat", 40))))], LENGTH, 4, 0, encoder.pad)
    loader.skip(1000)
    next(iter(loader))
    assert len(made) == 1


def test_a_pass_has_every_document_once(encoder: Encoder):
    """Finite sources with caps: passes are complete, the last batch is smaller, then it ends."""
    cats, dogs = texts("cat", 40), texts("dog", 30)
    components = [
        Component(Corpus(encoder(cats)), 5.0, "cats", max_epochs=2),
        Component(ShuffleBuffer(dogs, encoder, size=7), 0.1, "dogs", max_epochs=1),
    ]
    loader = PackedLoader(components, LENGTH, 4, 0, encoder.pad)
    batches = list(loader)
    expected = Counter({tuple(document.tokens.tolist()): 2 for document in encoder(cats)})
    expected.update(tuple(document.tokens.tolist()) for document in encoder(dogs))
    assert documents_of(batches) == expected
    assert {len(batch.tokens) for batch in batches[:-1]} == {4}
    assert 1 <= len(batches[-1].tokens) <= 4
    num_rows, num_tokens = (
        sum(len(batch.tokens) for batch in batches),
        sum(int((batch.documents >= 0).sum()) for batch in batches),
    )
    assert loader.padding == pytest.approx(1 - num_tokens / (LENGTH * num_rows))


def test_rows_keep_their_domain_and_weights_are_shares(
    components: list[Component], encoder: Encoder, tokenizer: Any
):
    loader = PackedLoader(components, LENGTH, 8, 3, encoder.pad)
    assert loader.domains == ["held", "made", "read"]
    batches = list(islice(loader, 150))
    sources = {"held": "cat", "read": "dog", "made": "What is"}
    for domain, tokens, ids in rows_of(batches[:20]):
        text = tokenizer.decode(tokens[ids >= 0])
        assert sources[loader.domains[domain]] in text
        assert not any(word in text for word in {"cat", "dog"} - {sources[loader.domains[domain]]})
    shares = torch.cat([batch.domain for batch in batches]).bincount() / 1200
    np.testing.assert_allclose(shares, [0.5, 0.25, 0.25], atol=4 * (0.25 / 1200) ** 0.5)


def test_a_used_up_source_leaves_its_weight_to_the_others(encoder: Encoder):
    cat, dog = (Corpus(encoder(texts(word, 9))) for word in ("cat", "dog"))
    components = [Component(cat, 9.0, "a", max_epochs=1), Component(dog, 1.0, "b")]
    batches = list(islice(PackedLoader(components, LENGTH, 4, 0, encoder.pad), 30))
    cats = {tuple(document.tokens.tolist()) for document in encoder(texts("cat", 9))}
    assert {
        document: times for document, times in documents_of(batches).items() if document in cats
    } == dict.fromkeys(cats, 1)
    assert all((batch.domain == 1).all() for batch in batches[15:])


def test_shuffle_buffer_keeps_every_document_and_depends_on_the_seed_alone(encoder: Encoder):
    buffer = ShuffleBuffer(texts("cat", 50), encoder, size=8)

    def order(seed: int) -> list[tuple[int, ...]]:
        return [tuple(document.tokens.tolist()) for document in buffer.draw(seed)]

    source = [tuple(document.tokens.tolist()) for document in encoder(texts("cat", 50))]
    assert order(1) == order(1) != order(2)
    assert sorted(order(1)) == sorted(source)
    assert all(
        source.index(document) <= k + 8 for k, document in enumerate(order(1))
    )  # nothing comes before it was read
    assert order(1) != source


def test_meta_stream_draws_other_problems_than_the_learner(encoder: Encoder):
    component = Component(
        Generated(Arithmetic("stream", {"chain_sum": {"max_digits": 4, "max_terms": 3}}), encoder)
    )
    first, second = (
        documents_of(islice(PackedLoader([component], LENGTH, 4, seed, encoder.pad), 20))
        for seed in (1, 2)
    )
    assert len(first.keys() & second.keys()) < 0.05 * len(first)


class Nothing:
    def draw(self, seed: int) -> Iterator[Encoded]:
        return iter(())


def test_bad_mixtures(encoder: Encoder):
    with pytest.raises(MetaVPTError, match="the source is empty"):
        next(iter(PackedLoader([Component(Nothing())], LENGTH, 4, 0, encoder.pad)))
    with pytest.raises(MetaVPTError, match=r"needs a source \(it has 0\)"):
        PackedLoader([], LENGTH, 4, 0, encoder.pad)
    for component in (
        Component(Nothing(), 0.0),
        Component(Nothing(), float("inf")),
        Component(Nothing(), max_epochs=0),
    ):
        with pytest.raises(MetaVPTError, match=r"weight=.* must be positive"):
            PackedLoader([component], LENGTH, 4, 0, encoder.pad)
    with pytest.raises(MetaVPTError, match="size=0 must be 1 or more"):
        ShuffleBuffer([], encoder, size=0)


ROW = 12
SIZES = st.lists(st.tuples(st.integers(1, ROW), st.integers(0, ROW)), max_size=60)


def documents_with(sizes: list[tuple[int, int]]) -> list[Encoded]:
    """Documents of the given (size, num_prompt) whose tokens are all different."""
    first = 1
    documents = []
    for size, num_prompt in sizes:
        documents.append(Encoded(np.arange(first, first + size, dtype=np.int32), num_prompt))
        first += size
    return documents


@settings(deadline=None, derandomize=True)
@given(SIZES, st.integers(1, 5))
def test_no_token_is_lost_and_no_target_crosses_a_boundary(
    sizes: list[tuple[int, int]], num_open: int
):
    documents = documents_with(sizes)
    packer = Packer(ROW, num_open)
    rows = list(packer(documents))
    packed = [document.tokens.tolist() for row in rows for document in row]
    assert sorted(packed) == [document.tokens.tolist() for document in documents]
    assert (packer.num_rows, packer.num_tokens) == (len(rows), sum(size for size, _ in sizes))
    if not rows:
        return
    batch = collate(rows, ROW, pad=0, seed=0, domains=[0] * len(rows))
    assert sorted(batch.tokens[batch.documents >= 0].tolist()) == list(
        range(1, packer.num_tokens + 1)
    )
    assert (batch.tokens[batch.documents < 0] == 0).all()
    expected = [
        token
        for document in documents
        for token in document.tokens[max(document.num_prompt, 1) :].tolist()
    ]
    assert sorted(batch.tokens[batch.loss_mask].tolist()) == expected
    for tokens, positions, ids, mask in zip(
        batch.tokens, batch.positions, batch.documents, batch.loss_mask, strict=True
    ):
        for t in mask.nonzero().flatten().tolist():
            assert t > 0
            assert ids[t] == ids[t - 1]
            assert (
                tokens[t] == tokens[t - 1] + 1
            )  # the same document: its tokens follow one another
            assert positions[t] == positions[t - 1] + 1
        for index in ids[ids >= 0].unique():
            where = (ids == index).nonzero().flatten()
            assert torch.equal(where, torch.arange(where[0], where[-1] + 1))
            assert torch.equal(positions[where], torch.arange(len(where)))


def test_best_fit():
    rows = list(
        Packer(10, num_open=2)(documents_with([(6, 0), (8, 0), (2, 0), (4, 0), (9, 0), (3, 0)]))
    )
    # 2 goes to the 8, the fullest with room; 4 to the 6; both are full when 9 comes, and one of
    # them is given out
    assert [[len(document.tokens) for document in row] for row in rows] == [
        [6, 4],
        [8, 2],
        [9],
        [3],
    ]


def test_little_padding_for_short_documents():
    rng = np.random.default_rng(0)
    packer = Packer(128)
    list(packer(documents_with([(int(size), 0) for size in rng.integers(10, 90, 2000)])))
    assert 1 - packer.num_tokens / (128 * packer.num_rows) < 0.06


def test_documents_that_do_not_fit():
    with pytest.raises(MetaVPTError, match="a document of 11 tokens does not fit into 10"):
        list(Packer(10)(documents_with([(11, 0)])))
    with pytest.raises(MetaVPTError, match="length=0 and num_open=16 must be positive"):
        Packer(0)
