"""Sources of language models: the hub, a folder, a GGUF file or random weights; LoRA."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from metavpt.errors import MetaVPTError, brief
from metavpt.learners.lm import LanguageModel

LAYER_BYTES = 270  # of a file, which the names and shapes of a layer's nine tensors take at least
SIZES = (
    "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads",
    "intermediate_size", "head_dim", "vocab_size",
)  # fmt: skip
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoRA:
    """W + alpha / rank * B A for each of `target_modules`, B zero at first (arXiv 2106.09685).

    All other parameters are frozen. There is no dropout, because losses are evaluated several times
    per step and must give equal values.
    """

    rank: int = 8
    alpha: float = 16.0
    target_modules: Sequence[str] = PROJECTIONS

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise MetaVPTError(f"LoRA: rank={self.rank} must be at least 1")

    def __call__(self, model: Any) -> Any:
        """Add the adapters to a model."""
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            target_modules=list(self.target_modules),
            lora_dropout=0.0,
        )
        try:
            return get_peft_model(model, config)
        except ValueError as error:
            raise MetaVPTError(
                f"LoRA: target_modules={list(self.target_modules)} do not fit the model: "
                f"{brief(error)}"
            ) from error


def pretrained_language_model(
    source: str | Path,
    tail_layers: int = 2,
    gguf_file: str | None = None,
    lora: LoRA | None = None,
    dtype: torch.dtype = torch.float32,
    frozen_layers: int = 0,
) -> LanguageModel:
    """Load a model.

    Args:
        source: A name on the hub, a folder, or a .gguf file. A GGUF file is dequantised.
        tail_layers: The last layers that form the tail.
        gguf_file: Names a GGUF file within a hub repository or folder.
        lora: Adapters to add.
        dtype: Of the weights.
        frozen_layers: First layers that are never trained, see `LanguageModel`.

    Raises:
        MetaVPTError: The model cannot be found, read, or split into trunk and tail.
    """
    path = Path(source)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise MetaVPTError(f"{path}: no such GGUF file")
        source, gguf_file = path.parent, path.name
    disable_progress_bar()
    file = Path(source) / gguf_file if gguf_file else Path(source)
    # trust_remote_code=None would ask on the terminal and wait.
    options: dict[str, Any] = {"gguf_file": gguf_file, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(str(source), **options)
        _check_size(config, file)
        options |= {
            "config": config,
            "dtype": dtype,
            "attn_implementation": "sdpa",
            "output_loading_info": True,
        }
        loaded: Any = AutoModelForCausalLM.from_pretrained(str(source), **options)
        model, info = loaded
        # transformers prints them and draws them at random.
        if missing := sorted(info["missing_keys"]):
            raise MetaVPTError(
                f"{file}: has no weights for {', '.join(missing[:3])}, {len(missing)} in all, "
                "which its configuration asks for"
            )
    except MetaVPTError:
        raise
    except Exception as error:  # a download and two file formats, each with errors of its own
        raise MetaVPTError(
            f"{file}: cannot be loaded as a language model ({brief(error, named=True)})"
        ) from error
    adapted = _adapted(_plain(model) if gguf_file else model, lora)
    return LanguageModel(adapted, tail_layers, frozen_layers)


def _check_size(config: Any, file: Path) -> None:
    """Raise MetaVPTError if a file or folder is too small for the model of its configuration.

    Otherwise the model would be built layer by layer first.
    """
    files = (
        [file]
        if file.is_file()
        else [path for path in file.glob("*") if path.suffix in (".safetensors", ".bin")]
    )
    num_bytes = sum(path.stat().st_size for path in files)
    layers, width, heads, key_heads, middle, head_dim, vocabulary = (
        int(getattr(config, name, None) or 0) for name in SIZES
    )
    block = width * (3 * middle + 2 * (head_dim or width // max(heads, 1)) * (heads + key_heads))
    least = vocabulary * width + layers * block
    if files and least / 8 + LAYER_BYTES * layers > num_bytes:
        raise MetaVPTError(
            f"{file}: its configuration asks for {layers} layers and {least} parameters or more, "
            f"which its {num_bytes} bytes cannot hold"
        )


def random_language_model(
    model_type: str = "llama",
    tail_layers: int = 2,
    lora: LoRA | None = None,
    frozen_layers: int = 0,
    **config: Any,
) -> LanguageModel:
    """Build a model with random weights.

    Args:
        model_type: llama, qwen2 or qwen3.
        tail_layers: The last layers that form the tail.
        lora: Adapters to add.
        frozen_layers: First layers that are never trained, see `LanguageModel`.
        **config: Replaces defaults of the transformers configuration.
    """
    try:
        described = AutoConfig.for_model(model_type, **config)
        model = AutoModelForCausalLM.from_config(described, attn_implementation="sdpa")
    except (ValueError, KeyError) as error:
        raise MetaVPTError(
            f"model_type={model_type}: no such language model ({brief(error)})"
        ) from error
    return LanguageModel(_adapted(model, lora), tail_layers, frozen_layers)


def _plain(model: Any) -> Any:
    """Remove the marks of quantisation, which would prevent saving."""
    config = copy.deepcopy(model.config)
    del config.quantization_config
    with torch.random.fork_rng():
        plain = AutoModelForCausalLM.from_config(
            config, dtype=model.dtype, attn_implementation="sdpa"
        )
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain


def _adapted(model: Any, lora: LoRA | None) -> Any:
    return model if lora is None else lora(model)
