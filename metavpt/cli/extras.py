"""Packages that come with an extra, and the line that names it where one is missing."""

from metavpt.errors import MetaVPTError

EXTRAS = {
    "run": (
        "hydra",
        "jinja2",
        "lightning_fabric",
        "matplotlib",
        "omegaconf",
        "PIL",
        "scipy",
        "yaml",
    ),
    "vision": ("h5py", "huggingface_hub", "kornia", "safetensors", "timm", "torchvision"),
    "language": ("accelerate", "datasets", "peft", "tokenizers", "transformers"),
}


def missing_extra(error: BaseException) -> MetaVPTError | None:
    """The error for a user who lacks an extra; None for any other error."""
    package = (getattr(error, "name", None) or "").partition(".")[0]
    for extra, packages in EXTRAS.items():
        if isinstance(error, ModuleNotFoundError) and package in packages:
            return MetaVPTError(
                f"the package {package} is not installed; pip install 'metavpt[{extra}]'"
            )
    return None
