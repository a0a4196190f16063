"""The errors that a user can do something about."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Packages that come with an extra of the installation.
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
    "optuna": ("optuna",),
}


class MetaVPTError(Exception):
    """One line that names the file or key at fault and says what to do.

    The commands print it without a traceback and exit with status 2.
    """


class UnreachedParameterError(MetaVPTError):
    """A loss does not depend on a parameter, whose derivative would be a silent zero."""


class ImpureLossError(MetaVPTError):
    """Two evaluations of a loss with the same arguments differ, or move a module's state."""


class UnsolvedError(MetaVPTError):
    """A linear solve ended no nearer to the solution than x = 0.

    Args:
        message: What happened and what to do.
        grad_evals: What the solve cost, in gradient evaluations.
    """

    def __init__(self, message: str, grad_evals: int = 0) -> None:
        super().__init__(message)
        self.grad_evals = grad_evals


class NonFiniteError(MetaVPTError):
    """A value that must be finite is NaN or infinite."""


def check_known(value: str, key: str, *known: str) -> None:
    """Raises MetaVPTError where the value of an option is none of those `known`."""
    if value not in known:
        raise MetaVPTError(f"{key}={value}: known are {', '.join(known)}")


def brief(error: BaseException, named: bool = False) -> str:
    """The message of an error as one line of at most 200 characters.

    Args:
        error: Any error; if it has no message its class stands for it.
        named: Whether the line begins with the class.
    """
    message, name = " ".join(str(error).split())[:200], type(error).__name__
    return f"{name}: {message}" if named and message else message or name


def missing_extra(error: BaseException) -> MetaVPTError | None:
    """The error for a user who lacks an extra; None for any other error."""
    package = (getattr(error, "name", None) or "").partition(".")[0]
    for extra, packages in EXTRAS.items():
        if isinstance(error, ModuleNotFoundError) and package in packages:
            return MetaVPTError(
                f"the package {package} is not installed; pip install 'metavpt[{extra}]'"
            )
    return None


@contextmanager
def reading(fault: str, remedy: str = "get the file again") -> Iterator[None]:
    """Turn any error inside the block into a MetaVPTError `<fault> (<reason>); <remedy>`.

    Use it around decoders only. A damaged file fails in as many ways as its format has fields, so
    every exception counts.

    Args:
        fault: The file and what is wrong with it.
        remedy: What the user can do.

    Raises:
        MetaVPTError: The block failed.
    """
    try:
        yield
    except MetaVPTError:
        raise
    except Exception as error:
        raise MetaVPTError(f"{fault} ({brief(error)}); {remedy}") from None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError inside the block, which writes `path`, into a MetaVPTError with its reason.

    Raises:
        MetaVPTError: The disk is full, a quota is used up, or the path is not allowed or too long.
    """
    try:
        yield
    except OSError as error:
        remedy = (
            "the previous contents are intact: free some space and continue with resume=true"
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            else "choose a folder that can be written"
        )
        raise MetaVPTError(
            f"{path}: cannot be written ({error.strerror or error}); {remedy}"
        ) from error
