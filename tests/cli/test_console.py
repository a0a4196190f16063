"""Names from files in messages: shown as they are, and never acted on by the terminal."""

import io
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from helpers import command_process
from PIL import Image
from rich.table import Table
from rich.text import Text

import metavpt
from metavpt.cli.console import Console, printable, say
from metavpt.cli.one_line_errors import reporting
from metavpt.data.ade20k import ADE20K
from metavpt.data.images import open_images
from metavpt.data.language import _say
from metavpt.data.loader import Readable, Skips
from metavpt.data.shards import Shards
from metavpt.errors import MetaVPTError
from metavpt.training.run_folder import newest_state
from metavpt.training.run_log import RunLog

CLEAR_SCREEN, COLOUR, C1, CLIPBOARD = "\x1b[2J", "\x1b[31m", "\x9b31m", "\x1b]52;c;aGk=\x07"
REVERSED, LONE = "\u202e", "\udcff"  # writing from right to left; a byte that is no UTF-8
HOSTILE = [CLEAR_SCREEN, COLOUR, C1, CLIPBOARD, REVERSED, LONE]
NAME = f"[/red]{CLEAR_SCREEN}"  # a closing tag that rich takes for an error, and a sequence
SHOWN = r"[/red]\x1b[2J"


def png(size: tuple[int, int] = (16, 16)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_what_acts_on_a_terminal_is_printed_as_an_escape(text: str, capsys):
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    table = Table("name")
    table.add_row(text)
    for show in (
        lambda: say("label", text),
        lambda: Console(width=200).print(text, Text(text), style="yellow"),
        lambda: Console(width=200).print(table),
    ):
        show()
        out, err = capsys.readouterr()
        assert escaped in out + err
        assert not set(out + err) & {"\x1b", "\x9b", "\x07", REVERSED, LONE}


def test_text_keeps_its_lines_its_tabs_and_its_letters():
    assert printable("naïve\t→ 日本\n[b]") == "naïve\t→ 日本\n[b]"


def test_markup_and_emoji_codes_are_text(capsys):
    Console().print("[bold]a[/bold] :cat: [/red]")
    assert capsys.readouterr().out == "[bold]a[/bold] :cat: [/red]\n"


def test_a_message_is_one_line(capsys):
    say("data:", "a name with\na line break")
    assert capsys.readouterr().err == "data: a name with\\na line break\n"


def test_the_console_still_moves_its_own_cursor():
    file = io.StringIO()
    with Console(file=file, force_terminal=True).status("working"):
        pass
    assert "\x1b[" in file.getvalue()


# Each of the places below crashed by `[/red]`, or passed the escape sequence on to the terminal.


def an_error(folder: Path) -> None:
    with pytest.raises(SystemExit), reporting():
        raise MetaVPTError(f"{NAME}: cannot be read")


def a_warning_of_a_run(folder: Path) -> None:
    RunLog(folder, Console()).warn(3, f"{NAME} failed")


def an_image_of_a_zip(folder: Path) -> None:
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        archive.writestr(f"0{NAME}.png", b"noise")
        archive.writestr("1.png", png())
    Readable(open_images(folder / "images.zip", (8, 8)), Skips())[0]


def an_image_of_a_shard(folder: Path) -> None:
    path = folder / f"{NAME.replace('/', '')}.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in (("0.png", b"noise"), ("1.png", png())):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    Shards([path], (8, 8))[0]


def an_image_without_annotation(folder: Path) -> None:
    for split in ("training", "validation"):
        for kind, end in (("images", "jpg"), ("annotations", "png")):
            (folder / kind / split).mkdir(parents=True)
            (folder / kind / split / f"a.{end}").write_bytes(png())
        (folder / "images" / split / f"{NAME.replace('/', '')}.jpg").write_bytes(png())
    ADE20K(folder, (8, 8))


def documents(folder: Path) -> None:
    _say(f"3 rows of {NAME} are too long")


def a_damaged_checkpoint(folder: Path) -> None:
    place = folder / NAME / "checkpoints"
    place.mkdir(parents=True)
    torch.save({"problem": {}}, place / "step-00000001.pt")
    (place / "step-00000002.pt").write_bytes(b"noise")
    newest_state(folder / NAME)


PLACES = [
    an_error, a_warning_of_a_run, an_image_of_a_zip, an_image_of_a_shard,
    an_image_without_annotation, documents, a_damaged_checkpoint,
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_a_hostile_name_is_shown_and_does_nothing(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("METAVPT_CACHE", str(tmp_path / "cache"))
    place(tmp_path)
    out, err = capsys.readouterr()
    said = (out + err).replace("\n", "")
    assert SHOWN in said or SHOWN.replace("/", "") in said
    assert "\x1b" not in said


def test_a_run_goes_into_a_folder_with_any_name(tmp_path):
    options = ["problem=toy_sources", "budget.steps=2", "trainer.probe_every=2", "threads=1"]
    status, output = command_process.finish(tmp_path, *options, f"output='{NAME}'")
    assert status == 0, output
    assert SHOWN in output.replace("\n", "")
    assert "\x1b" not in output


def test_a_traceback_shows_names_too():
    code = "from metavpt.cli.one_line_errors import run_command\n"
    code += "def main():\n    raise ValueError('\\x1b[2J')\nrun_command(main)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.endswith("ValueError: \\x1b[2J\n")


def test_nothing_prints_but_through_the_console():
    """rich's own console reads markup and passes escape sequences on."""
    package = Path(metavpt.__file__).parent
    ways = re.compile(
        r"from rich\.console import .*\bConsole\b|from rich import print|rich\.markup"
    )
    found = [
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if ways.search(path.read_text()) and path.name != "console.py"
    ]
    assert found == []
