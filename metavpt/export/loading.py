"""Trained learners for Python: `model = metavpt.load("exported")`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor, nn

from metavpt.cli.configuration import read_config
from metavpt.data.photo import decode
from metavpt.errors import MetaVPTError, brief, check_known, reading
from metavpt.hypergradients import params
from metavpt.learners.layouts import HUB_NAME
from metavpt.training.run_folder import newest_state

# Imported where they are used: a language model needs no timm, and a backbone no transformers.
if TYPE_CHECKING:
    from metavpt.learners.tokenized import TokenizedModel
    from metavpt.learners.vit import Backbone, Features

Part = Literal["student", "teacher"]
FORMATS = {"timm": ("timm",), "transformers": ("transformers",), "both": ("timm", "transformers")}
# The attribute of the problem that holds it, and what may stand before the backbone's names in
# there.
PARTS = {
    "student": ("learner", ("backbone.",)),
    "teacher": ("teacher", ("learner.backbone.", "learner.")),
}
Picture = Image.Image | str | Path


class FrozenBackbone(nn.Module):
    """A trained backbone that takes images as they come.

    Args:
        backbone: Takes normalised images.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: "Backbone") -> None:
        super().__init__()
        self.backbone = backbone.eval()
        for name in ("mean", "std"):
            values = torch.tensor(getattr(backbone, name)).view(3, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def forward(self, images: Tensor, size: Sequence[int] | None = None) -> "Features":
        """Compute the features of images uint8 (B, 3, H, W), see `features`."""
        patch = self.backbone.patch_size
        height, width = size or (max(1, round(s / patch)) * patch for s in images.shape[-2:])
        pixels = images.to(next(self.parameters())) / 255
        if pixels.shape[-2:] != (height, width):
            pixels = F.interpolate(
                pixels, (height, width), mode="bilinear", antialias=True, align_corners=False
            )
        return self.backbone((pixels - self.mean) / self.std)

    @torch.no_grad()
    def features(
        self, images: Tensor | Picture | Sequence[Picture], size: Sequence[int] | None = None
    ) -> "Features":
        """Compute the features of images: `cls` (B, D) and `patches` (B, D, h, w).

        Args:
            images: uint8 (B, 3, H, W), or a picture or several of one size: PIL images or files.
            size: (H, W) that they are resized to. None: the nearest that the patches divide.

        Raises:
            MetaVPTError: Images of several sizes, a file that is none, or a size that does not fit.
        """
        if not isinstance(images, Tensor):
            pictures = [images] if isinstance(images, Picture) else images
            images = _stacked([_pixels(picture) for picture in pictures])
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise MetaVPTError(
                f"features: images are {images.dtype} {tuple(images.shape)}; give uint8 "
                "(B, 3, H, W), PIL images or files"
            )
        return self(images, size)


def load(source: str | Path, part: Part = "student") -> "FrozenBackbone | TokenizedModel":
    """Load the trained learner of an exported folder, of a run or of a pushed export.

    Args:
        source: A folder of `metavpt.export` or of a run, or owner/name on the Hugging Face hub.
        part: Of a run: the student, or the teacher, its moving average.

    Returns:
        A frozen backbone, whose `features` takes images; or a language model with its tokenizer.

    Raises:
        MetaVPTError: There is no such folder, or it does not hold what is asked for.
    """
    folder = _local(str(source))
    if not (folder / "config.yaml").is_file():
        raise MetaVPTError(f"{source}: not the folder of an export or a run (no config.yaml)")
    config = read_config(folder)
    if not config.get("learner"):
        return FrozenBackbone(read_backbone(folder, config, part))
    if (folder / "checkpoints").is_dir():
        raise MetaVPTError(
            f"{source}: a language model is loaded from its export; first python -m metavpt.export "
            f"run={source} to=exported"
        )
    from metavpt.learners.tokenized import released

    return released((), exported_weights(folder))


def read_backbone(folder: Path, config: DictConfig, part: Part = "student") -> "Backbone":
    """Read the backbone of an exported folder or of the newest checkpoint of a run."""
    from metavpt.learners.vit import create_backbone

    if (folder / "checkpoints").is_dir():
        return trained_backbone(folder, config, part)
    own = {"pretrained": False, "weights": exported_weights(folder), "frozen_blocks": 0}
    return create_backbone(**backbone_options(config) | own).eval()


def trained_backbone(run: Path, config: DictConfig, part: Part) -> "Backbone":
    """Load the student's or the teacher's backbone from the newest checkpoint of `run`."""
    from metavpt.learners.vit import create_backbone

    problem, path = newest_state(run)
    check_known(part, "part", *PARTS)
    module, prefixes = PARTS[part]
    if module not in problem:
        raise MetaVPTError(
            f"part={part}: the run has no {part}, its checkpoint holds "
            f"{', '.join(problem) or 'nothing'}"
        )
    found = (params.subset(problem[module], prefix) for prefix in prefixes)
    state = next((state for state in found if any(key.startswith("trunk.") for key in state)), None)
    if state is None:
        raise MetaVPTError(
            f"part={part}: the {module} in {path} has no vision transformer as its backbone"
        )
    options = {**backbone_options(config), "pretrained": False, "weights": None, "frozen_blocks": 0}
    backbone = create_backbone(**options).eval()
    try:
        backbone.load_state_dict(state)
    except RuntimeError as error:
        raise MetaVPTError(
            f"{path} does not fit the backbone in {run / 'config.yaml'}: "
            f"{' '.join(str(error).split())[:200]}"
        ) from error
    return backbone


def backbone_options(config: DictConfig) -> dict[str, Any]:
    """Return the options of `create_backbone` in the configuration of a run."""
    options: Any = OmegaConf.to_container(config.backbone)
    return {key: value for key, value in options.items() if key != "_target_"}


def exported_weights(folder: Path) -> Path:
    """Return the folder of the weights in an exported folder."""
    found = next((folder / name for name in FORMATS["both"] if (folder / name).is_dir()), None)
    if found is None:
        raise MetaVPTError(
            f"{folder}: holds neither checkpoints nor exported weights ({', '.join(FORMATS)})"
        )
    return found


def _local(source: str) -> Path:
    if Path(source).exists() or not (on_hub := HUB_NAME.fullmatch(source)):
        return Path(source)
    try:
        return Path(snapshot_download(on_hub[1], revision=on_hub[2]))
    except Exception as error:  # of several libraries: no network, no such name, no access
        raise MetaVPTError(
            f"{source}: no such folder here, and the Hugging Face hub does not give it "
            f"({brief(error)})"
        ) from error


def _pixels(picture: Picture) -> Tensor:
    if isinstance(picture, Image.Image):
        return torch.from_numpy(np.array(picture.convert("RGB"))).movedim(-1, 0)
    with reading(f"{picture}: cannot be read", "name another file"):
        return decode(Path(picture).read_bytes(), str(picture))


def _stacked(pictures: Sequence[Tensor]) -> Tensor:
    sizes = sorted({tuple(picture.shape[1:]) for picture in pictures})
    if len(sizes) != 1:
        raise MetaVPTError(
            f"features: give at least one image, and all of one size, not {sizes}; resize them, or "
            "call once for each"
        )
    return torch.stack(list(pictures))
