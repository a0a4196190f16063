"""A file holds one noun, a function one thought: neither is long."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("metavpt", "problems", "benchmarks", "examples", "docs", "tests")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
MOST_LINES, MOST_OF_A_FUNCTION = 300, 40


def test_no_file_is_long() -> None:
    long = {str(path.relative_to(ROOT)): lines for path in FILES if (lines := len(path.read_text().splitlines())) > MOST_LINES}
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
