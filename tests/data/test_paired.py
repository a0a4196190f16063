"""Which images and label maps belong together, and which are for evaluation."""

from pathlib import Path

import pytest

from metavpt.data.paired import find_items, split
from metavpt.errors import MetaVPTError


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def pairs(root: Path, images, masks) -> list[tuple[str, str]]:
    return [
        (str(item.image.relative_to(root)), str(item.maps["masks"].relative_to(root)))
        for item in find_items(root, images, {"masks": masks})
    ]


@pytest.mark.parametrize(
    ("images", "masks", "layout"),
    [
        ("images", "masks", [("images/a.jpg", "masks/a.png"), ("images/b.JPG", "masks/b.png")]),
        ("x", "y", [("x/val/deep/a.png", "y/val/deep/a.png"), ("x/train/a.png", "y/train/a.png")]),
        ("images/*.png", "labels/*_L.png", [("images/a_1.png", "labels/a_1_L.png")]),
        (  # Cityscapes
            "leftImg8bit/**/*_leftImg8bit.png",
            "gtFine/**/*_gtFine_labelTrainIds.png",
            [
                (
                    f"leftImg8bit/{p}/bonn/bonn_0_leftImg8bit.png",
                    f"gtFine/{p}/bonn/bonn_0_gtFine_labelTrainIds.png",
                )
                for p in ("train", "val")
            ],
        ),
        ("*/images/*", "*/masks/*", [("val/images/a.jpg", "val/masks/a.png")]),
        (["train", "test"], ["trainannot", "testannot"], [("test/a.png", "testannot/a.png")]),
        ("*.jpg", "*.png", [("a.b.jpg", "a.b.png"), ("c.jpg", "c.png")]),
        ("[ab]?.jpg", "m[ab]?.png", [("a1.jpg", "ma1.png"), ("b2.jpg", "mb2.png")]),
    ],
)
def test_pairs_of_many_layouts(tmp_path: Path, images, masks, layout) -> None:
    touch(tmp_path, *(name for pair in layout for name in pair))
    if isinstance(images, list):
        touch(tmp_path, "train/z.png", "trainannot/z.png")
        layout = [("train/z.png", "trainannot/z.png"), *layout]
    assert sorted(pairs(tmp_path, images, masks)) == sorted(layout)


def test_lists_pair_by_line(tmp_path: Path) -> None:
    touch(tmp_path, "p/one.jpg", "p/two.jpg", "q/eins.png", "q/zwei.png")
    (tmp_path / "images.txt").write_text("p/two.jpg\np/one.jpg\n")
    (tmp_path / "masks.txt").write_text("q/zwei.png\n\nq/eins.png\n")
    assert pairs(tmp_path, "images.txt", "masks.txt") == [
        ("p/two.jpg", "q/zwei.png"),
        ("p/one.jpg", "q/eins.png"),
    ]


def test_hidden_and_other_files_are_left_out(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.jpg", "images/._a.jpg", "images/readme.txt", "masks/a.png")
    assert pairs(tmp_path, "images", "masks") == [("images/a.jpg", "masks/a.png")]


@pytest.mark.parametrize(
    ("images", "masks", "message"),
    [
        ("photos", "masks", r"data\.images=photos: .* does not exist"),
        ("images", "masks/*.bmp", r"data\.masks=masks/\*\.bmp: no file"),
        ("images", "other", r"the first are other/x_L\.png and images/a\.jpg"),
        (["images", "images"], "masks", r"names 2 places and data\.masks 1"),
        ("double", "masks", r"a\.jpg and .*a\.png have one name"),
    ],
)
def test_what_does_not_pair_is_named(tmp_path: Path, images, masks, message: str) -> None:
    touch(tmp_path, "images/a.jpg", "masks/a.png", "other/x_L.png", "double/a.jpg", "double/a.png")
    with pytest.raises(MetaVPTError, match=message):
        find_items(tmp_path, images, {"masks": masks})


def parts(root: Path, names: list[str], train=None, val=None) -> tuple[list[str], list[str]]:
    touch(root, *names)
    found, _ = split(root, [root / name for name in names], train, val)
    return [names[i] for i in found["train"]], [names[i] for i in found["val"]]


def test_folders_of_usual_names_are_for_evaluation(tmp_path: Path) -> None:
    """Test images are never trained on, also where there are val images."""
    names = ["images/train/a.png", "images/val/b.png", "images/test/c.png"]
    assert parts(tmp_path, names) == (["images/train/a.png"], ["images/val/b.png"])
    assert parts(tmp_path, [names[0], names[2]]) == ([names[0]], [names[2]])


def test_a_share_is_drawn_once_and_for_all(tmp_path: Path) -> None:
    names = [f"{i}.png" for i in range(20)]
    train, val = parts(tmp_path, names)
    assert (len(train), len(val)) == (16, 4)
    assert parts(tmp_path, names, val=0.2) == (train, val)
    assert len(parts(tmp_path, names, val=0.5)[1]) == 10


def test_lists_choose_by_path_or_stem(tmp_path: Path) -> None:
    names = ["i/a.jpg", "i/b.jpg", "i/c.jpg", "i/d.jpg"]
    (tmp_path / "train.txt").write_text("a\nb.jpg\n")
    (tmp_path / "val.txt").write_text("i/c.jpg\n")
    assert parts(tmp_path, names, "train.txt", "val.txt") == (["i/a.jpg", "i/b.jpg"], ["i/c.jpg"])
    assert parts(tmp_path, names, None, "i/[cd].jpg") == (names[:2], names[2:])


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        (None, 1.5, r"data\.val=1\.5"),
        ("i/a.jpg", "i", r"a\.jpg: is in data\.train and in data\.val"),
        (None, "i", r"no image of 2 is left for train"),
        (None, "names.txt", r"the line 'nobody' is the name of no image"),
    ],
)
def test_bad_splits_are_named(tmp_path: Path, train, val, message: str) -> None:
    (tmp_path / "names.txt").write_text("a\nnobody\n")
    with pytest.raises(MetaVPTError, match=message):
        parts(tmp_path, ["i/a.jpg", "i/b.jpg"], train, val)
