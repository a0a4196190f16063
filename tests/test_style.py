"""A file holds one noun, a function one thought: neither is long, and none is written twice."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("metavpt", "problems", "benchmarks", "examples", "docs", "tests")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
MOST_LINES, MOST_OF_A_FUNCTION, MOST_REPEATED = 300, 40, 5


def test_no_file_is_long() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in FILES
        if (lines := len(path.read_text().splitlines())) > MOST_LINES
    }
    assert len(FILES) > 200
    assert not long


def test_no_function_is_long() -> None:
    functions = [
        (f"{path.relative_to(ROOT)}: {node.name}", (node.end_lineno or 0) - node.lineno + 1)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert len(functions) > 1000
    assert not {name: lines for name, lines in functions if lines > MOST_OF_A_FUNCTION}


def bodies(path: Path) -> Iterator[list[tuple[int, str]]]:
    """The numbered lines of each function without blank ones and comments; nor its signature, which repeats that of its protocol."""
    text = path.read_text()
    lines = [line.split("  # ")[0].strip() for line in text.splitlines()]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            numbers = range(node.body[0].lineno, (node.end_lineno or 0) + 1)
            yield [
                (number, lines[number - 1])
                for number in numbers
                if lines[number - 1] and not lines[number - 1].startswith("#")
            ]


def test_no_code_stands_twice() -> None:
    places: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for path in FILES:
        if path.relative_to(ROOT).parts[0] in ("metavpt", "problems"):
            for body in bodies(path):
                for start in range(len(body) - MOST_REPEATED):
                    window = body[start : start + MOST_REPEATED + 1]
                    places[tuple(text for _, text in window)].add(
                        f"{path.relative_to(ROOT)}:{window[0][0]}"
                    )
    assert len(places) > 3000
    assert not [where for where in places.values() if len(where) > 1]
