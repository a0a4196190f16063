"""Tiny shards: which images, in which order, and what happens to those that cannot be read."""

import io
import multiprocessing
import tarfile
import threading
from collections import Counter
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.damaged import MIB, growth
from PIL import Image

from metavpt import MetaVPTError
from metavpt.data.images import open_images
from metavpt.data.loader import WINDOW, EndlessBatches, ImageLoader
from metavpt.data.shards import Shards, download, expand, find_shards
from metavpt.training.streams import Stream, time_limit


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("METAVPT_CACHE", str(tmp_path / "cache"))


def png(value):
    """A grey image of one value, by which it is known again."""
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(file, "png")
    return file.getvalue()


def write_shard(path, values, broken=()):
    """Each image beside a text, as in webdataset pairs. Noise replaces the `broken` ones."""
    with tarfile.open(path, "w") as tar:
        for value in values:
            for name, data in (
                (f"{value}.png", b"noise" if value in broken else png(value)),
                (f"{value}.txt", b"a caption"),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def folder(tmp_path):
    """24 shards of 3 images: 0, 1, 2 in the first, and so on."""
    place = tmp_path / "shards"
    place.mkdir()
    for k in range(24):
        write_shard(place / f"train-{k:03d}.tar", range(3 * k, 3 * k + 3))
    return place


def values(batch):
    return batch.images[:, 0, 0, 0].tolist()


def test_patterns():
    assert expand("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand("{x,y}-{0..1}.tar") == ["x-0.tar", "x-1.tar", "y-0.tar", "y-1.tar"]
    assert expand("plain.tar") == ["plain.tar"]
    with pytest.raises(MetaVPTError, match=r"\{a\.\.c\} in x-\{a\.\.c\}\.tar must be two numbers"):
        expand("x-{a..c}.tar")


@pytest.mark.parametrize(
    "pattern", ["x-{0..30000000}.tar", f"x-{{0..{'9' * 5000}}}.tar", f"x{'{a,b}' * 40}.tar"]
)
def test_a_pattern_that_stands_for_too_many_shards_is_refused(pattern):
    def call():
        with pytest.raises(MetaVPTError, match=r"data\.unlabelled: .*x"), time_limit(60, "HANGS"):
            expand(pattern)

    assert growth(call) < 64 * MIB


def test_every_way_of_naming_shards(folder):
    for spec in (folder, folder / "*.tar", folder / "train-{000..023}.tar"):
        images = open_images(spec, (8, 8))
        assert [int(images[k][0, 0, 0]) for k in range(72)] == list(range(72))
    assert len(open_images(folder / "train-{003,005}.tar", (8, 8))) == 6
    with pytest.raises(MetaVPTError, match=r"no shard .*train-024\.tar"):
        find_shards(str(folder / "train-{023..024}.tar"))


def test_an_epoch_holds_every_image_once_and_stays_within_few_shards(folder):
    images = Shards(sorted(folder.glob("*.tar")), (8, 8))
    order = [
        i
        for _, batch in zip(range(9), EndlessBatches(72, 8, 5, groups=images.groups), strict=False)
        for i in batch
    ]
    assert sorted(order) == list(range(72))
    window = 3 * WINDOW
    assert len({i // 3 for i in order[:window]}) == WINDOW
    assert order[:window] != sorted(order[:window])
    other = [
        i
        for _, batch in zip(range(9), EndlessBatches(72, 8, 6, groups=images.groups), strict=False)
        for i in batch
    ]
    assert sorted(other) == sorted(order) != other != order


def test_resuming_in_the_middle_of_a_shard_goes_on_exactly(folder):
    source = lambda seed: ImageLoader(open_images(folder, (8, 8)), 5, seed)
    whole = Stream(source, 3)
    expected = [next(whole) for _ in range(20)]  # through the end of an epoch
    stream = Stream(source, 3)
    for _ in range(7):
        next(stream)
    resumed = Stream(source, 3)
    resumed.load_state_dict(stream.state_dict())
    for batch in expected[7:]:
        again = next(resumed)
        assert torch.equal(again.images, batch.images)
        assert again.seed == batch.seed


def test_two_ranks_together_see_every_image_of_the_epoch_once(folder):
    loaders = [ImageLoader(open_images(folder, (8, 8)), 8, 0) for _ in range(2)]
    for rank, loader in enumerate(loaders):
        loader.share(rank, 2)
    alone = ImageLoader(open_images(folder, (8, 8)), 8, 0)
    seen = Counter()
    for _, batch, *parts in zip(range(9), alone, *loaders, strict=False):
        assert values(batch) == values(parts[0]) + values(parts[1])
        seen.update(values(parts[0]) + values(parts[1]))
    assert seen == Counter(range(72))


def test_a_broken_image_is_left_out_for_the_next_one_and_said_once(tmp_path, capsys):
    write_shard(tmp_path / "a.tar", [1, 2, 3], broken=[1, 3])
    images = open_images(tmp_path / "a.tar", (8, 8))
    assert [int(images[k][0, 0, 0]) for k in (0, 1, 2, 0)] == [2, 2, 2, 2]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert "a.tar: image 0 is left out" in said[0]
    assert images.unreadable == {0, 2}


def test_shards_that_cannot_be_used_are_errors_that_name_them(tmp_path):
    write_shard(tmp_path / "all.tar", [1, 2], broken=[1, 2])
    with pytest.raises(MetaVPTError, match=r"all\.tar: none of its 2 images"):
        open_images(tmp_path / "all.tar", (8, 8))[0]
    (tmp_path / "no.tar").write_bytes(b"not a tar" * 100)
    with pytest.raises(MetaVPTError, match=r"no\.tar: not a readable"):
        open_images(tmp_path / "no.tar", (8, 8))
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    with pytest.raises(MetaVPTError, match=r"empty\.tar: the shard holds no image"):
        open_images(tmp_path / "empty.tar", (8, 8))
    with tarfile.open(tmp_path / "cut.tar", "w") as tar:
        member = tarfile.TarInfo("1.png")
        member.size = 5000
        tar.addfile(member, io.BytesIO(bytes(5000)))
    (tmp_path / "cut.tar").write_bytes((tmp_path / "cut.tar").read_bytes()[:3000])
    with pytest.raises(MetaVPTError, match=r"cut\.tar"):
        open_images(tmp_path / "cut.tar", (8, 8))


def test_contents_are_kept_until_the_shard_changes(tmp_path):
    shard = tmp_path / "a.tar"
    write_shard(shard, [1, 2])
    assert len(Shards([shard], (8, 8))) == 2
    (kept,) = (tmp_path / "cache" / "shards").iterdir()
    before = kept.stat().st_mtime_ns
    assert len(Shards([shard], (8, 8))) == 2
    assert kept.stat().st_mtime_ns == before
    write_shard(shard, [1, 2, 3, 4, 5, 6, 7, 8])
    assert len(Shards([shard], (8, 8))) == 8


def test_a_damaged_list_of_contents_is_made_anew(tmp_path):
    write_shard(tmp_path / "a.tar", [1, 2])
    Shards([tmp_path / "a.tar"], (8, 8))
    (kept,) = (tmp_path / "cache" / "shards").iterdir()
    kept.write_bytes(kept.read_bytes()[:20])
    assert len(Shards([tmp_path / "a.tar"], (8, 8))) == 2


def test_a_member_that_claims_more_than_the_shard_is_refused(tmp_path):
    """A sparse member whose header declares a much larger size than the file has."""
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("1.png"))
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[156:157], data[386:398], data[483:495] = b"S", b"%011o\0" % 0, b"%011o\0" % 2**32
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(MetaVPTError, match=r"a\.tar: the shard is cut short"):
        open_images(tmp_path / "a.tar", (8, 8))


def test_workers_read_the_same_and_none_stays_behind(folder):
    images = open_images(folder, (8, 8))
    alone = iter(ImageLoader(images, 6, 1))
    source = lambda seed: ImageLoader(images, 6, seed, num_workers=2)
    stream = Stream(source, 1)
    for _ in range(3):
        assert torch.equal(next(stream).images, next(alone).images)
    assert len(multiprocessing.active_children()) == 2
    stream.load_state_dict({"epoch": 0, "position": 1})  # lets go of its iterator
    assert multiprocessing.active_children() == []


@pytest.fixture
def server(folder):
    """The address of the folder, served, and the names that were asked for."""
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(folder))

        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def test_shards_of_an_address_are_downloaded_once(server, folder, tmp_path):
    pytest.importorskip("aiohttp")
    address, asked = server
    spec = Path(f"{address}/train-{{003..004}}.tar")  # as data.unlabelled comes: one slash
    for _ in range(2):
        images = open_images(spec, (8, 8))
        assert [int(images[i][0, 0, 0]) for i in range(6)] == list(range(9, 15))
    assert asked == ["/train-003.tar", "/train-004.tar"]
    with pytest.raises(MetaVPTError, match=r"train-099\.tar cannot be downloaded"):
        find_shards(f"{address}/train-099.tar")
    assert not list((tmp_path / "cache").rglob("*.part"))


@pytest.mark.parametrize("address", ["file:///a.tar", "ssh://host/a.tar", "http://a::file://b.tar"])
def test_other_addresses_are_refused(address):
    with pytest.raises(MetaVPTError, match="known addresses are https"):
        download(address)
