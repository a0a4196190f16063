"""Export of a run's language model as a checkpoint of transformers, with its tokenizer."""

from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from metavpt.data.tokens import TokenBatch
from metavpt.errors import MetaVPTError
from metavpt.export.model_card import Description, Usage, class_name
from metavpt.learners.lm import LanguageModel
from metavpt.training.run_folder import newest_state

TOLERANCE = 1e-4  # of the largest logit: adapters are merged, which rounds
LENGTH = 16  # tokens that are compared


def export_language_model(
    run: Path, config: DictConfig, folder: Path, part: str, format: str
) -> Description:
    """Write the model of the newest checkpoint of `run` to `folder`/transformers, adapters merged.

    It is read back and compared. The problem is built again from `config`, because a tokenizer that
    was trained for the run depends on its texts: the data must still be there.
    """
    if part != "student":
        raise MetaVPTError(
            f"part={part}: a language model has no teacher; part=student is what was trained"
        )
    if format not in ("both", "transformers"):
        raise MetaVPTError(
            f"format={format}: a language model is exported for transformers; leave format out"
        )
    state, path = newest_state(run)
    problem = instantiate(config.problem, _convert_="all")
    try:
        problem.learner.load_state_dict(state.get("learner", {}))
    except RuntimeError as error:
        raise MetaVPTError(
            f"{path} does not fit the learner in {run / 'config.yaml'}: "
            f"{' '.join(str(error).split())[:200]}"
        ) from error
    place = folder / "transformers"
    problem.learner.save(place)
    problem.data.encoder.tokenizer.save_pretrained(place)
    _compare(problem.learner, place)
    usage = Usage(
        "transformers", 'transformers.AutoModelForCausalLM.from_pretrained("transformers")'
    )
    name = Path(str(config.learner.get("source") or class_name(config.learner))).name
    return Description(
        f"{name}, continued by metavpt",
        "text-generation",
        _about(config),
        "Likelihoods and greedy answers.",
        [
            f"{name}, weight {source.get('weight', 1)}: {_origin(source.documents)}"
            for name, source in config.data.stream.items()
        ],
        _licence(config),
        [usage],
    )


@torch.no_grad()
def _compare(learner: LanguageModel, place: Path) -> None:
    """Raise MetaVPTError if the model in `place` has other logits than the learner."""
    AutoTokenizer.from_pretrained(place)
    tokens = torch.randint(
        learner.vocab_size, (1, LENGTH), generator=torch.Generator().manual_seed(0)
    )
    nothing = torch.zeros_like(tokens)
    batch = TokenBatch(
        tokens,
        torch.arange(LENGTH)[None],
        nothing,
        nothing.bool(),
        0,
        torch.zeros(1, dtype=torch.int64),
    )
    expected = learner.logits(batch)
    found = AutoModelForCausalLM.from_pretrained(place, dtype=expected.dtype)(tokens).logits
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference <= TOLERANCE:
        raise MetaVPTError(
            "transformers gives other logits than the run's model (relative difference "
            f"{difference:.1e}); nothing was exported"
        )


def _about(config: DictConfig) -> str:
    source = config.learner.get("source")
    origin = f"`{source}`" if source else f"`{class_name(config.learner)}`"
    adapters = ", through LoRA adapters that are merged in," if config.learner.get("lora") else ""
    return (
        f"The language model {origin}, trained on{adapters} with `{class_name(config.problem)}` "
        "on unlabelled text, "
        f"its targets made by `{class_name(config.strategy)}`."
    )


def _origin(documents: Any) -> str:
    return str(documents.get("name") or class_name(documents))


def _licence(config: DictConfig) -> str:
    known: dict[str, Any] = {
        "from_scratch": "These weights were trained from random ones, so no released weights "
        "restrict them.",
        "smollm2_135m": "These weights derive from SmolLM2-135M-Instruct, whose licence "
        "(Apache 2.0) also applies to them.",
    }
    source = config.learner.get("source")
    derived = f"These weights derive from `{source}`, whose licence also applies to them."
    return known.get(class_name(config.learner), derived)
