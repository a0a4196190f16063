"""Weights made to exhaust the memory: a small file that asks for gigabytes."""

import io
import shutil
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from helpers.damaged import MIB, growth

from metavpt.errors import MetaVPTError
from metavpt.learners.vit import create_backbone
from metavpt.learners.weights import _backbone, _read_file
from metavpt.training import checkpoint

READERS = {
    "weights": lambda path: _backbone(_read_file(path), path),
    "checkpoint": checkpoint.read,
}


def saved(**state: torch.Tensor) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def deflated(path: Path) -> None:
    """What torch.save writes, compressed: 256 MiB in 300 kB."""
    whole = zipfile.ZipFile(io.BytesIO(saved(weight=torch.zeros(2**26))))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member in whole.infolist():
            archive.writestr(member.filename, whole.read(member))


def overlapping(path: Path) -> None:
    """Thirty entries of the table of contents that share the bytes of one."""
    data = saved(weight=torch.zeros(2**18))
    archive = zipfile.ZipFile(io.BytesIO(data))
    entry = next(m for m in archive.infolist() if m.filename.endswith("data/0"))
    start = archive.start_dir
    table = data[start : data.rindex(b"PK\x05\x06")]
    table = table[: table.index(b"PK\x06\x06")] if b"PK\x06\x06" in table else table
    at = table.index(entry.filename.encode()) - 46
    end = table.find(b"PK\x01\x02", at + 4)
    record = table[at:end] if end > 0 else table[at:]
    table += record * 30
    count = len(archive.infolist()) + 30
    close = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, count, count, len(table), start, 0)
    path.write_bytes(data[:start] + table + close)


@pytest.mark.parametrize("make", [deflated, overlapping])
@pytest.mark.parametrize("reader", READERS)
def test_a_file_that_holds_more_than_its_bytes_is_refused(make, reader, tmp_path):
    path = tmp_path / "step-00000001.pt"
    make(path)
    said: list[str] = []

    def read() -> None:
        with pytest.raises(MetaVPTError) as caught:
            READERS[reader](path)
        said.append(str(caught.value))

    assert growth(read) < 64 * MIB
    assert str(path) in said[0]


@pytest.mark.parametrize("kind", ["expanded", "sparse", "meta"])
def test_a_tensor_that_is_larger_than_what_the_file_holds_is_refused(kind, tmp_path):
    tensor = {
        "expanded": torch.zeros(1).expand(10**6, 10**6),
        "sparse": torch.sparse_coo_tensor(torch.zeros(2, 1), torch.ones(1), (10**6, 10**6)),
        "meta": torch.empty(10**6, 10**6, device="meta"),
    }[kind]
    path = tmp_path / "a.pt"
    path.write_bytes(saved(**{"patch_embed.proj.weight": tensor}))
    with pytest.raises(MetaVPTError, match=r"a\.pt"):
        _backbone(_read_file(path), path)


def test_views_of_one_storage_are_read(tmp_path):
    whole = torch.arange(12.0)
    path = tmp_path / "a.pt"
    path.write_bytes(saved(**{"patch_embed.proj.weight": whole[:4].view(2, 2), "norm": whole[4:]}))
    assert _backbone(_read_file(path), path)["norm"].tolist() == list(range(4, 12))


@pytest.fixture(scope="module")
def bomb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bomb") / "a.pt"
    deflated(path)
    return path


@pytest.mark.parametrize(
    "options",
    [
        {"checkpoint_path": "a.pt"},
        {"pretrained": True, "pretrained_cfg_overlay": {"file": "a.pt"}},
        {"pretrained": True, "pretrained_cfg": {"url": "http://127.0.0.1:9/a.pt"}},
        {"pretrained": True, "cache_dir": "."},
    ],
    ids=lambda options: list(options)[-1],
)
@pytest.mark.parametrize("name", ["vit_small_patch16_224", "vit_tiny_dinov3"])
def test_timm_reads_no_weights_by_itself(
    name, options, bomb: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Files by weights= alone, which is checked; no address of a configuration is fetched."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(bomb, tmp_path)

    def build() -> None:
        with pytest.raises(MetaVPTError, match=rf"^backbone\.{list(options)[-1]}: .*weights="):
            create_backbone(name, 1, embed_dim=32, depth=2, num_heads=2, **options)

    assert growth(build) < 64 * MIB
