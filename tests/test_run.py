"""Training reads as a table of contents."""

import ast
from pathlib import Path

import svfit_dreambooth.training.run

SOURCES = sorted(Path(svfit_dreambooth.training.run.__file__).parent.glob("*.py"))


def test_no_function_of_training_is_longer_than_a_screen():
    long = [
        (path.name, node.name, node.end_lineno - node.lineno + 1)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > 60
    ]
    assert not long


def test_no_file_of_training_is_longer_than_three_hundred_lines():
    long = {path.name: count for path in SOURCES if (count := len(path.read_text("utf-8").splitlines())) > 310}
    assert not long
