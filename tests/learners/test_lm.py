import pytest
import torch
from helpers.tiny_lm import VOCAB, packed, tiny_lm
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from metavpt.check.modes import Float64
from metavpt.errors import MetaVPTError
from metavpt.hypergradients import params
from metavpt.learners.lm import LanguageModel, document_mask
from metavpt.learners.pretrained_lm import LoRA

KINDS = ["llama", "qwen2", "qwen3"]


@pytest.fixture(autouse=True)
def float64():
    """transformers computes norms in float32 whatever the model's dtype."""
    with Float64():
        yield


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits_equal_those_of_transformers(kind):
    learner, batch = tiny_lm(kind), packed([[9], [9]])
    expected = learner.transformers_model(batch.tokens).logits
    torch.testing.assert_close(learner.logits(batch), expected, atol=1e-10, rtol=0)
    assert expected.std() > 0.1  # the weights are wide enough for a difference to show


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_packed_documents_have_the_logits_of_separate_ones(kind):
    learner, batch = tiny_lm(kind), packed([[4, 6, 2], [3, 5]])
    logits = learner.logits(batch)
    for b, row in enumerate([[4, 6, 2], [3, 5]]):
        for start, length in zip([0, *torch.tensor(row).cumsum(0).tolist()], row, strict=False):
            alone = learner.transformers_model(
                batch.tokens[b : b + 1, start : start + length]
            ).logits[0]
            torch.testing.assert_close(logits[b, start : start + length], alone, atol=1e-10, rtol=0)


@torch.no_grad()
def test_single_documents_need_no_mask_whatever_their_padding():
    learner, batch = tiny_lm(), packed([[8], [5]])
    assert document_mask(batch.documents) is None
    hidden = learner.hidden({}, batch)
    mask = (batch.documents[:, :, None] == batch.documents[:, None, :]).tril()[:, None]
    masked = learner.states({}, hidden._replace(mask=mask))
    torch.testing.assert_close(learner(batch)[1, :5], masked[1, :5], atol=1e-10, rtol=0)


def test_the_mask_joins_a_token_to_the_earlier_ones_of_its_own_document():
    mask = document_mask(torch.tensor([[0, 0, 1, 1, -1]]))
    assert mask is not None
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]
    assert mask[0, 0].int().tolist() == expected


@pytest.mark.parametrize("kind", KINDS)
def test_trunk_and_tail_hold_every_parameter_once(kind):
    learner = tiny_lm(kind, tail_layers=2)
    whole = learner.transformers_model
    assert sum(p.numel() for p in learner.parameters()) == sum(
        p.numel() for p in whole.parameters()
    )
    assert {id(p) for p in learner.parameters()} == {id(p) for p in whole.parameters()}
    assert learner.tied == (kind != "qwen2")
    assert ("lm_head.weight" in params.named(learner)) == (kind == "qwen2")
    aligned = learner.aligned_parameters()
    assert {name.split(".")[2] for name in aligned if "layers" in name} == {"1", "2"}
    assert "tail.norm.weight" in aligned


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@torch.no_grad()
def test_functional_calls_use_theta_alone(kind):
    learner, other, batch = tiny_lm(kind, seed=0), tiny_lm(kind, seed=3), packed([[4, 5], [7]])
    theta = params.detach(params.named(other))
    states = learner.states(theta, learner.hidden(theta, batch))
    torch.testing.assert_close(
        states @ learner.unembedding(theta).T, other.logits(batch), atol=1e-12, rtol=0
    )
    assert not torch.allclose(learner.logits(batch), other.logits(batch))


@torch.no_grad()
def test_trunk_and_tail_say_the_same_compiled():
    plain, learner, batch = (
        tiny_lm("llama"),
        tiny_lm("llama"),
        packed([[4, 5], [7]]),
    )  # packed: the mask breaks the trunk's graph in two
    learner.trunk.compile(backend="eager")
    learner.tail.compile(backend="eager")
    torch.testing.assert_close(learner.logits(batch), plain.logits(batch), atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_adapters_change_nothing_at_first_and_alone_are_trained(kind):
    plain, adapted, batch = tiny_lm(kind), tiny_lm(kind, lora=LoRA(rank=2)), packed([[4, 5], [7]])
    torch.testing.assert_close(adapted.logits(batch), plain.logits(batch), atol=1e-12, rtol=0)
    names = list(params.named(adapted))
    assert len(names) == 3 * 7 * 2
    assert all("lora_" in name for name in names)
    assert adapted.aligned_parameters() == [
        name for name in names if name.startswith("tail.layers.2.")
    ]


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["full", "lora"])
@torch.no_grad()
def test_what_is_saved_loads_into_transformers_with_the_same_logits(tmp_path, lora):
    learner, batch = tiny_lm("qwen3", lora=lora), packed([[9], [9]])
    for p in params.named(learner).values():
        p.add_(0.1 * torch.randn_like(p))
    learner.save(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(
        loaded(batch.tokens).logits, learner.logits(batch), atol=1e-10, rtol=0
    )


def test_the_learner_is_saved_live_and_keeps_its_adapters(tmp_path):
    learner = tiny_lm(lora=LoRA(rank=2))
    names = list(params.named(learner))
    learner.save(tmp_path)
    assert list(params.named(learner)) == names


def test_frozen_layers_and_the_embedding_are_not_trained():
    names = params.named(tiny_lm(tail_layers=1, frozen_layers=2))
    assert names
    assert all(name.startswith(("tail.layers.2.", "tail.norm.")) for name in names)
    untied = params.named(tiny_lm("qwen2", tail_layers=1, frozen_layers=1))
    assert "lm_head.weight" in untied
    assert any(name.startswith("trunk.layers.1.") for name in untied)
    assert not any(name.startswith(("trunk.embed", "trunk.layers.0.")) for name in untied)
    with pytest.raises(MetaVPTError, match="frozen_layers=3"):
        tiny_lm(frozen_layers=3)


@pytest.mark.parametrize("tail_layers", [0, 4])
def test_a_tail_out_of_range_is_an_error(tail_layers):
    with pytest.raises(MetaVPTError, match=f"tail_layers={tail_layers}"):
        tiny_lm(tail_layers=tail_layers)


def test_other_architectures_are_refused():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(MetaVPTError, match="GPT2LMHeadModel: supported"):
        LanguageModel(model)


def test_what_is_random_or_stateful_or_windowed_is_refused():
    with pytest.raises(MetaVPTError, match="attention_dropout"):
        tiny_lm(attention_dropout=0.1)
    with pytest.raises(MetaVPTError, match="rope_type=dynamic"):
        tiny_lm(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(MetaVPTError, match="sliding"):
        tiny_lm("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1)
