"""Weights of a backbone from a local file."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from metavpt.errors import MetaVPTError
from metavpt.params import Params


def load_weights(model: nn.Module, file: Path, name: str) -> None:
    """The weights in `file`, under timm's keys, into `model`, which messages call `name`; a classifier ("head.") is left out."""
    state = {key: value for key, value in _read_state(file).items() if not key.startswith("head.")}
    own = model.state_dict()
    faults = [f"missing {key}" for key in own if key not in state] + [f"unexpected {key}" for key in state if key not in own]
    shapes = {key: (tuple(state[key].shape), tuple(own[key].shape)) for key in own if key in state}
    faults += [f"{key} is {theirs}, not {ours}" for key, (theirs, ours) in shapes.items() if theirs != ours]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise MetaVPTError(f"{file} does not fit {name}: {'; '.join(faults[:3])}{more} (keys must be timm's own)")
    model.load_state_dict(state)


def _read_state(file: Path) -> Params:
    if file.suffix not in (".safetensors", ".pt", ".pth"):
        raise MetaVPTError(f"{file}: weights must be a .safetensors, .pt or .pth file")
    if not file.is_file():
        raise MetaVPTError(f"{file}: no such weights file")
    try:
        state = load_file(file) if file.suffix == ".safetensors" else torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError) as error:
        raise MetaVPTError(f"{file}: cannot be read as weights: {error}") from error
    except Exception as error:  # pickle.UnpicklingError and its kin: a file that holds more than tensors
        raise MetaVPTError(f"{file}: holds more than tensors, which weights_only refuses; save a plain state dict") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise MetaVPTError(f"{file}: is no state dict (name -> tensor)")
    return state
