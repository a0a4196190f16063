"""The terminal. Everything that the package prints goes through this module.

Messages quote names from files: members of archives, folders, parameters. Such a name must not be
read as rich's markup (`[/red]` without an opening tag is an error), and must not control the
terminal (escape sequences move the cursor, set colours or write to the clipboard).
"""

import os
import unicodedata
from collections.abc import Iterable
from typing import Any

from rich import console as rich_console
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

FILE_WIDTH = 100  # columns, where output goes to a file or a pipe; rich's 80 break tables
ACTS = {"Cc", "Cf", "Cs"}  # Unicode categories: control, format (reversed writing), surrogate


class Console(rich_console.Console):
    r"""rich's console for text from any source.

    Strings are printed unchanged, without markup or emoji codes. Give colours as styles, or in a
    rich Text. Control characters are shown as escapes, as in `\x1b[2J`. Outside a terminal a line
    has `FILE_WIDTH` columns, or as many as the variable COLUMNS says.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, **options})
        if not self.is_terminal and "COLUMNS" not in os.environ and "width" not in options:
            self.width = FILE_WIDTH

    def render_str(self, text: str, **options: Any) -> Text:
        """Escape control characters before columns are measured."""
        return super().render_str(printable(text), **options)  # before columns are measured

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Escape control characters in all output except the console's own."""
        for segment in super().render(renderable, options):
            if segment.control:  # the console's own: a progress bar moves the cursor
                yield segment
            else:
                yield Segment(printable(segment.text), segment.style)


def printable(text: str) -> str:
    """Replace control characters other than newline and tab by escapes."""
    if text.isprintable():
        return text
    return "".join(
        char.encode("unicode_escape").decode()
        if unicodedata.category(char) in ACTS and char not in "\n\t"
        else char
        for char in text
    )


def say(label: str, message: str, style: str = "bold") -> None:
    """Print `label` in `style` and `message` on stderr, as one line."""
    line = Text.assemble((label, style), " ", printable(message).replace("\n", "\\n"))
    Console(stderr=True, soft_wrap=True).print(line, highlight=False)
