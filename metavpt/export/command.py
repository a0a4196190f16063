"""`python -m metavpt.export run=<run folder> to=<new folder> [part=student|teacher] [format=...]`.

Writes the trained learner in formats that other libraries read. `push_to_hub=owner/name` puts the
folder on the Hugging Face hub too.
"""

import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, get_token
from omegaconf import DictConfig, OmegaConf

from metavpt.cli.configuration import allowed, command, read_config
from metavpt.cli.console import Console
from metavpt.errors import MetaVPTError, brief
from metavpt.export.loading import Part
from metavpt.export.model_card import Description, model_card


def export(
    run: Path,
    to: Path,
    part: Part = "student",
    format: str = "both",
    allow_targets: Sequence[str] = (),
) -> Path:
    """Write the learner of the newest checkpoint of `run` to the new folder `to`.

    There is a folder for each format, README.md, a model card, and the run's config.yaml. A
    backbone is written for timm and transformers, a language model for transformers with its
    tokenizer. Each is read back and compared before anything appears at `to`.
    """
    if to.exists():
        raise MetaVPTError(f"to={to}: is there already; name a new folder")
    config = _config(run, allow_targets)
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=to.parent, prefix=f".{to.name}-") as scratch:
        made = Path(scratch) / to.name
        description = _write(run, config, made, part, format)
        (made / "README.md").write_text(model_card(run, config, description))
        (made / "config.yaml").write_text(OmegaConf.to_yaml(config))
        mode = (made / "README.md").stat().st_mode
        for file in made.rglob("*"):  # some libraries write files for their owner alone
            if file.is_file():
                file.chmod(mode)
        try:
            os.rename(made, to)
        except OSError as error:  # someone else made it meanwhile
            raise MetaVPTError(f"to={to}: cannot be made ({error.strerror})") from error
    return to


def _write(run: Path, config: DictConfig, folder: Path, part: Part, format: str) -> Description:
    # Each needs its extra, as the run did.
    if config.get("learner"):
        from metavpt.export.language_model import export_language_model

        return export_language_model(run, config, folder, part, format)
    from metavpt.export.backbone import export_backbone

    return export_backbone(run, config, folder, part, format)


def _config(run: Path, allow_targets: Sequence[str]) -> DictConfig:
    config = read_config(run, allow_targets)
    if not (config.get("learner") or "name" in (config.get("backbone") or {})):
        raise MetaVPTError(
            f"{run / 'config.yaml'}: names neither a backbone of create_backbone nor a language "
            "model; no other learner can be exported"
        )
    return config


def push(folder: Path, name: str) -> str:
    """Upload an exported folder to the Hugging Face hub, into a private repository if it is new.

    Args:
        folder: What `export` wrote.
        name: owner/name.

    Returns:
        The address of the repository.

    Raises:
        MetaVPTError: The hub refuses. The folder stays.
    """
    api = HfApi()
    try:
        url = str(api.create_repo(name, private=True, exist_ok=True))
        api.upload_folder(
            repo_id=name, folder_path=folder, commit_message="Export a learner of metavpt"
        )
    except Exception as error:  # of several libraries: no network, no access, no space
        raise MetaVPTError(
            f"push_to_hub={name}: {folder} is written, but the hub refuses it ({brief(error)})"
        ) from error
    return url


def _check_hub(name: str) -> None:
    """Check what an upload needs before anything is written."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise MetaVPTError(f"push_to_hub={name}: give owner/name of the repository")
    if get_token() is None:
        raise MetaVPTError(
            f"push_to_hub={name}: no token of the Hugging Face hub; run `hf auth login`, or set "
            "HF_TOKEN"
        )


@command("export")
def main(cfg: DictConfig) -> None:
    """Entry point of `python -m metavpt.export`."""
    if cfg.push_to_hub:
        _check_hub(str(cfg.push_to_hub))
    folder = export(Path(cfg.run), Path(cfg.to), cfg.part, cfg.format, allowed("allow_targets"))
    Console(soft_wrap=True).print(f"exported: {folder}")
    if cfg.push_to_hub:
        Console(soft_wrap=True).print(f"pushed: {push(folder, str(cfg.push_to_hub))}")
