"""A generated data set like CamVid: 11 classes, 11 for ignored pixels, PNG masks of numbers."""

from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (24, 32)
NUM_CLASSES, IGNORED = 11, 11


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        Image.fromarray(array).save(path)


def generate(index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image uint8 (H, W, 3), classes uint8 (H, W), depth float32 (H, W): blocks of brightness."""
    rng = np.random.default_rng(index)
    blocks = rng.integers(0, NUM_CLASSES + 1, (3, 4))
    mask = blocks.repeat(SIZE[0] // 3, 0).repeat(SIZE[1] // 4, 1).astype(np.uint8)
    image = (20 * mask[..., None] + rng.integers(0, 15, (*SIZE, 3))).astype(np.uint8)
    return image, mask, (1 + mask / 2).astype(np.float32)


def camvid(root: Path, num_train: int = 20, num_val: int = 5) -> Path:
    """images/{train,val}/*.png and masks/{train,val}/*.png."""
    for i in range(num_train + num_val):
        part, (image, mask, _) = "train" if i < num_train else "val", generate(i)
        save(root / "images" / part / f"{i:03d}.png", image)
        save(root / "masks" / part / f"{i:03d}.png", mask)
    return root
