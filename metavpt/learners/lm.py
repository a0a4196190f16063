"""Causal language models from transformers, split into trunk and tail.

The last layers (tail) can run again without the first ones (trunk).
"""

import copy
from pathlib import Path
from typing import Any, NamedTuple

from peft import PeftModel
from torch import Tensor, nn
from torch.func import functional_call
from transformers import LlamaForCausalLM, PreTrainedModel, Qwen2ForCausalLM, Qwen3ForCausalLM

from metavpt.data.tokens import PADDING, TokenBatch
from metavpt.errors import MetaVPTError
from metavpt.hypergradients import params
from metavpt.hypergradients.params import Params
from metavpt.learners.recompute import numbered, run_blocks

SUPPORTED = (LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)


class Hidden(NamedTuple):
    """The output of the trunk and input of the tail."""

    states: Tensor  # (B, T, D)
    rope: tuple[Tensor, Tensor]  # cosine and sine of the rotary positions, (B, T, D / heads) each
    # (B, 1, T, T), True where the row's token sees the column's. None: all earlier tokens.
    mask: Tensor | None

    def detach(self) -> "Hidden":
        """Return the same without a graph."""
        return self._replace(states=self.states.detach())


class Trunk(nn.Module):
    """Tokens -> Hidden: the embedding and the first layers, with the names of transformers."""

    recompute = False  # whether activations are recomputed in the backward pass

    def __init__(self, model: nn.Module, num_layers: int) -> None:
        super().__init__()
        self.embed_tokens: Any = model.embed_tokens
        self.rotary_emb: Any = model.rotary_emb
        self.layers = numbered(_layers(model), 0, num_layers)

    def forward(self, batch: TokenBatch) -> Hidden:
        """Run the embedding and the first layers."""
        embedded = self.embed_tokens(batch.tokens)
        rope, mask = self.rotary_emb(embedded, batch.positions), document_mask(batch.documents)
        return Hidden(_run(self, embedded, rope, mask), rope, mask)


class Tail(nn.Module):
    """Hidden -> states (B, T, D): the last layers and the final norm.

    `functional_call` would unpack Hidden, a tuple: call `functional_call(tail, theta, (hidden,))`.
    """

    recompute = False

    def __init__(self, model: nn.Module, num_layers: int) -> None:
        super().__init__()
        layers = _layers(model)
        self.layers = numbered(layers, len(layers) - num_layers, len(layers))
        self.norm: Any = model.norm

    def forward(self, hidden: Hidden) -> Tensor:
        """Run the last layers."""
        return self.norm(_run(self, *hidden))


def _layers(model: Any) -> nn.ModuleList:
    return model.layers


def _run(
    part: Trunk | Tail, states: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None
) -> Tensor:
    context = {"attention_mask": mask, "position_embeddings": rope}
    return run_blocks(part.layers, states, part.recompute, **context)


def document_mask(documents: Tensor) -> Tensor | None:
    """Return the block-diagonal causal mask (B, 1, T, T): True where t attends to s.

    Positions attend within their document, s <= t. None if a causal mask is enough, which is the
    case with one document per row: nothing attends to padding on its right. Without a mask,
    attention uses its faster causal kernel.
    """
    if bool(((documents == documents[:, :1]) | (documents == PADDING)).all()):
        return None
    return (documents[:, :, None] == documents[:, None, :]).tril()[:, None]


class LanguageModel(nn.Module):
    """Tokens -> states (B, T, D) after the final norm.

    Logits are states @ unembedding^T; losses compute them for a few tokens at a time. The forward
    pass is a pure function of the parameters: nothing is random and no buffer moves. `width` is D.

    Args:
        model: A Llama, Qwen2 or Qwen3 from transformers, or one with LoRA adapters (peft). Its
            modules are used, not copied.
        tail_layers: The last layers that form, with the final norm, the tail.
        frozen_layers: So many first layers, and the embedding before them, are never trained. An
            unembedding that is tied to the embedding stays with it.
    """

    def __init__(
        self, model: PreTrainedModel | PeftModel, tail_layers: int = 2, frozen_layers: int = 0
    ) -> None:
        super().__init__()
        whole: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        _check_supported(whole)
        self.num_layers: int = whole.config.num_hidden_layers
        if not 1 <= tail_layers <= self.num_layers:
            raise MetaVPTError(
                f"tail_layers={tail_layers} is out of range: the model has {self.num_layers} layers"
            )
        if not 0 <= frozen_layers < self.num_layers:
            raise MetaVPTError(
                f"frozen_layers={frozen_layers} must leave one of the model's {self.num_layers} "
                "layers to train"
            )
        if frozen_layers:
            for part in (whole.model.embed_tokens, *_layers(whole.model)[:frozen_layers]):
                part.requires_grad_(False)
        self.trunk = Trunk(whole.model, self.num_layers - tail_layers)
        self.tail = Tail(whole.model, tail_layers)
        self.tied = whole.lm_head.weight is whole.model.embed_tokens.weight
        if not self.tied:
            self.lm_head: Any = whole.lm_head
        self.width: int = whole.config.hidden_size
        self.vocab_size: int = whole.config.vocab_size
        self.max_length: int = whole.config.max_position_embeddings
        # in tuples: as attributes they would bring every parameter in under a second name
        self._whole, self._saved = (whole,), (model,)

    @property
    def transformers_model(self) -> Any:
        """The same weights as a transformers model, for `generate`."""
        return self._whole[0]

    def forward(self, batch: TokenBatch) -> Tensor:
        """Compute states (B, T, D) of a batch."""
        return self.tail(self.trunk(batch))

    def logits(self, batch: TokenBatch) -> Tensor:
        """Compute all logits (B, T, V) at once; for small batches."""
        return self(batch) @ self.unembedding({}).T

    def hidden(self, theta: Params, batch: TokenBatch) -> Hidden:
        """Run the trunk with the parameters theta."""
        return functional_call(self.trunk, params.subset(theta, "trunk."), (batch,))

    def states(self, theta: Params, hidden: Hidden) -> Tensor:
        """Run the tail with the parameters theta: states (B, T, D)."""
        return functional_call(self.tail, params.subset(theta, "tail."), (hidden,))

    def unembedding(self, theta: Params) -> Tensor:
        """Return the unembedding (V, D): theta's if trained, the embedding if the two are tied."""
        name = "trunk.embed_tokens.weight" if self.tied else "lm_head.weight"
        return theta[name] if name in theta else self.get_parameter(name)

    def aligned_parameters(self) -> list[str]:
        """Return the names of the tail's trained parameters: layers and final norm, or adapters."""
        return [name for name in params.named(self) if name.startswith("tail.")]

    def save(self, folder: str | Path) -> None:
        """Write a model folder, adapters merged, for `AutoModelForCausalLM.from_pretrained`."""
        (model,) = self._saved
        merged: Any = (
            copy.deepcopy(model).merge_and_unload() if isinstance(model, PeftModel) else model
        )
        merged.save_pretrained(folder)


def _check_supported(model: Any) -> None:
    name = type(model).__name__
    if not isinstance(model, SUPPORTED):
        raise MetaVPTError(
            f"{name}: supported language models are "
            f"{', '.join(kind.__name__ for kind in SUPPORTED)}"
        )
    config = model.config
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise MetaVPTError(
            f"{name}: has sliding-window layers (use_sliding_window), which trunk and tail do not "
            "mask; turn them off"
        )
    # These two scale their frequencies by the longest sequence seen: state that moves inside a
    # loss.
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind in ("dynamic", "longrope"):
        raise MetaVPTError(
            f"{name}: rope_type={kind} changes with the data it has seen; choose default, linear, "
            "yarn or llama3"
        )
    # Losses are evaluated many times a step and differentiated by differences: the forward pass
    # must draw nothing.
    random = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Dropout) and module.p
    ]
    if random or config.attention_dropout:
        raise MetaVPTError(
            f"{name}: {random[0] if random else 'attention_dropout'} is random in the forward "
            "pass; leave dropout at 0"
        )
    if model.config._attn_implementation != "sdpa":
        raise MetaVPTError(
            f"{name}: attn_implementation={model.config._attn_implementation}; load the model "
            "with 'sdpa'"
        )
