"""The terminal: everything that the package prints goes through this module.

Messages quote names that files bring along: members of archives, folders, parameters. Such a name
must neither be read as rich's markup (`[/red]` without an opening tag is an error) nor act on the
terminal (escape sequences move the cursor, set colours or write to the clipboard).
"""

import unicodedata
from collections.abc import Iterable
from typing import Any

from rich import console as rich_console
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

ACTS = {"Cc", "Cf", "Cs"}  # Unicode categories: control, format (reversed writing), surrogate


class Console(rich_console.Console):
    r"""rich's console, for text that may come from anywhere.

    Strings are printed as they are, without markup or emoji codes; colours are given as styles, or
    in a rich Text. Characters that would act on the terminal are shown as escapes, as in `\x1b[2J`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, **options})

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)  # before columns are measured

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control:  # the console's own: a progress bar moves the cursor
                yield segment
            else:
                yield Segment(printable(segment.text), segment.style)


def printable(text: str) -> str:
    """`text` with every character that acts on a terminal, other than newline and tab, as an escape."""
    if text.isprintable():
        return text
    return "".join(
        char.encode("unicode_escape").decode()
        if unicodedata.category(char) in ACTS and char not in "\n\t"
        else char
        for char in text
    )


def say(label: str, message: str, style: str = "bold") -> None:
    """Print `label` in `style` and then `message` on stderr, as one line."""
    line = Text.assemble((label, style), " ", printable(message).replace("\n", "\\n"))
    Console(stderr=True, soft_wrap=True).print(line, highlight=False)
