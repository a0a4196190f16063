"""Batched generation with a cache against one token at a time without, and what stops it."""

from pathlib import Path

import pytest
import torch

from metavpt.data.tokenizer import train_tokenizer
from metavpt.data.tokens import Encoder, TokenBatch
from metavpt.errors import MetaVPTError
from metavpt.learners.lm import LanguageModel
from metavpt.learners.pretrained_lm import random_language_model
from metavpt.probes.generation import Generator, left_padded

PROMPTS = [
    "Question: What is 3 + 4?\nAnswer:",
    "Question: Who?\nAnswer:",
    "Question: A tale of forty words, or fewer than that?\nAnswer:",
]


@pytest.fixture
def encoder(tmp_path: Path) -> Encoder:
    return Encoder(train_tokenizer(PROMPTS, 300, tmp_path), 64)


def model_of(encoder: Encoder, kind: str = "llama", seed: int = 0) -> LanguageModel:
    """float64, with weights wide enough for every token to have a clear favourite after it."""
    torch.manual_seed(seed)
    return random_language_model(
        kind, 1, vocab_size=len(encoder.tokenizer), hidden_size=16, intermediate_size=24,
        num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, max_position_embeddings=96, initializer_range=0.5,
        tie_word_embeddings=False,
    ).double()  # fmt: skip


@torch.no_grad()
def naive(learner: LanguageModel, encoder: Encoder, prompt: str, num_tokens: int) -> list[int]:
    """Greedy, by the learner's forward pass on the whole text: no cache, no padding."""
    tokens = encoder.tokenizer(prompt)["input_ids"]
    start = len(tokens)
    while len(tokens) < start + num_tokens and tokens[-1] != encoder.eos:
        row = torch.tensor([tokens])
        batch = TokenBatch(
            row,
            torch.arange(len(tokens))[None],
            torch.zeros_like(row),
            torch.ones_like(row).bool(),
            0,
            torch.zeros(1),
        )
        tokens = [*tokens, int(learner.logits(batch)[0, -1].argmax())]
    return tokens[start:]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_greedy_generation_is_the_naive_loop(encoder: Encoder, kind: str) -> None:
    learner = model_of(encoder, kind)
    texts = Generator(encoder, 12, batch_size=2, stop=())(learner, PROMPTS)
    expected = [
        encoder.tokenizer.decode(naive(learner, encoder, prompt, 12), skip_special_tokens=True)
        for prompt in PROMPTS
    ]
    assert texts == expected
    assert len(set(texts)) == 3


def test_it_ends_at_eos_and_at_a_text_that_stops_it(encoder: Encoder) -> None:
    learner = model_of(encoder)
    whole = Generator(encoder, 12, stop=())(learner, PROMPTS[:1])[0]
    stop = whole[4:7]
    assert stop not in whole[:4]
    assert Generator(encoder, 12, stop=[stop])(learner, PROMPTS[:1])[0] == whole.partition(stop)[0]
    ids = naive(learner, encoder, PROMPTS[0], 12)
    encoder.eos, original = ids[5], encoder.eos
    try:
        cut = Generator(encoder, 12, stop=())(learner, PROMPTS[:1])[0]
        assert cut == encoder.tokenizer.decode(ids[: ids.index(ids[5]) + 1])
    finally:
        encoder.eos = original


def test_samples_are_those_of_the_seed_and_leave_the_global_generator_alone(
    encoder: Encoder,
) -> None:
    """Whatever the model was released with: top_k=1 would make every sample the greedy one."""
    learner, generator = model_of(encoder), Generator(encoder, 8, stop=())
    released = learner.transformers_model.generation_config
    released.update(do_sample=False, top_k=1, repetition_penalty=3.0)
    before = torch.get_rng_state()
    samples = [generator(learner, PROMPTS * 4, temperature=2.0, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(before, torch.get_rng_state())
    assert samples[0] == samples[1] != samples[2]
    assert len(set(samples[0])) > len(PROMPTS)
    assert learner.transformers_model.generation_config is released
    assert generator(learner, PROMPTS) == [
        encoder.tokenizer.decode(naive(learner, encoder, p, 8), skip_special_tokens=True)
        for p in PROMPTS
    ]


def test_padding_is_on_the_left() -> None:
    tokens, mask = left_padded([[5, 6, 7], [8]], pad=0)
    assert tokens.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_a_prompt_longer_than_the_context_is_an_error(encoder: Encoder) -> None:
    with pytest.raises(
        MetaVPTError,
        match=r"a prompt of \d+ tokens and max_new_tokens=90 do not fit into the context of 96",
    ):
        Generator(encoder, 90)(model_of(encoder), PROMPTS)
    with pytest.raises(MetaVPTError, match="max_new_tokens=0"):
        Generator(encoder, 0)
