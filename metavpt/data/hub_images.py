"""Unlabelled images of a Hugging Face data set, read in place."""

from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from metavpt.data.photo import decode, fit
from metavpt.errors import MetaVPTError, brief

PREFIX = "hf:"
SAVED = ("dataset_dict.json", "state.json")  # in a folder of save_to_disk


class HubImages(Dataset[Tensor]):
    """The images of a Hugging Face data set: uint8 (3, *size). Labels are not read.

    The data set is mapped into memory, so every image is one read away. A set of the hub is
    downloaded once into the cache of `datasets`: a true stream would have a shuffle buffer that no
    checkpoint holds.

    Args:
        source: A folder of `save_to_disk`, or hf:owner/name or hf:owner/name:split for a set of the
            hub. The split is `train`, unless it is named or the only one.
        size: (H, W). Images are scaled to cover it and cropped around the centre.

    Raises:
        MetaVPTError: The package datasets is missing, or the set cannot be had, or has no images.
    """

    def __init__(self, source: str, size: tuple[int, int]) -> None:
        try:
            import datasets
        except ImportError:
            raise MetaVPTError(
                f"data.unlabelled: {source}: Hugging Face data sets need the package datasets: pip "
                "install datasets"
            ) from None
        self.source, self.size = source, size
        found = _load(datasets, source)
        columns = [
            name for name, kind in found.features.items() if isinstance(kind, datasets.Image)
        ]
        if not columns:
            raise MetaVPTError(
                f"data.unlabelled: {source}: has no column of images (it has "
                f"{', '.join(found.features)})"
            )
        self.column = columns[0]
        as_bytes = datasets.Image(decode=False)
        self.rows = found.select_columns([self.column]).cast_column(self.column, as_bytes)
        if not len(self.rows):
            raise MetaVPTError(f"data.unlabelled: {source}: holds no image")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        name = f"{self.source}: image {index}"
        image: Any = self.rows[index][self.column]
        try:
            data = image["bytes"] or Path(image["path"]).read_bytes()
        except (OSError, TypeError) as error:
            raise MetaVPTError(f"{name}: cannot be read ({brief(error)})") from None
        return fit(decode(data, name), self.size)


def is_saved(folder: Path) -> bool:
    """Return whether `save_to_disk` wrote this folder."""
    return any((folder / name).is_file() for name in SAVED)


def _load(datasets: Any, source: str) -> Any:
    name, _, split = source.removeprefix(PREFIX).partition(":")
    try:
        if not source.startswith(PREFIX):
            found = datasets.load_from_disk(source)
        else:
            found = datasets.load_dataset(name, split=split or None)
    except Exception as error:  # of several libraries: no network, no such name, a damaged file
        raise MetaVPTError(
            f"data.unlabelled: {source}: the data set cannot be had ({brief(error)}); check its "
            "name and split"
        ) from error
    if not isinstance(found, dict):
        return found
    if len(found) > 1 and "train" not in found:
        raise MetaVPTError(
            f"data.unlabelled: {source}: has no split train, but {', '.join(found)}; name one, as "
            "in hf:owner/name:split, or the folder of one"
        )
    return found["train"] if "train" in found else next(iter(found.values()))
