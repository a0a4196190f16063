import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metavpt.data.packing import Packer
from metavpt.data.tokens import Encoded, collate
from metavpt.errors import MetaVPTError

LENGTH = 12
SIZES = st.lists(st.tuples(st.integers(1, LENGTH), st.integers(0, LENGTH)), max_size=60)


def documents_of(sizes: list[tuple[int, int]]) -> list[Encoded]:
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
    documents = documents_of(sizes)
    packer = Packer(LENGTH, num_open)
    rows = list(packer(documents))
    packed = [document.tokens.tolist() for row in rows for document in row]
    assert sorted(packed) == [document.tokens.tolist() for document in documents]
    assert (packer.num_rows, packer.num_tokens) == (len(rows), sum(size for size, _ in sizes))
    if not rows:
        return
    batch = collate(rows, LENGTH, pad=0, seed=0, domains=[0] * len(rows))
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
        Packer(10, num_open=2)(documents_of([(6, 0), (8, 0), (2, 0), (4, 0), (9, 0), (3, 0)]))
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
    list(packer(documents_of([(int(size), 0) for size in rng.integers(10, 90, 2000)])))
    assert 1 - packer.num_tokens / (128 * packer.num_rows) < 0.06


def test_documents_that_do_not_fit():
    with pytest.raises(MetaVPTError, match="a document of 11 tokens does not fit into 10"):
        list(Packer(10)(documents_of([(11, 0)])))
    with pytest.raises(MetaVPTError, match="length=0 and num_open=16 must be positive"):
        Packer(0)
