"""The README's Python runs, and its map shows the rooms that there are."""

import pathlib
import re

import deqjax

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_python_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 1
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    # Each print says in a comment what it prints.
    promised = re.findall(r"print\(.*\)  # (.*)", "".join(blocks))
    assert capsys.readouterr().out.splitlines() == promised


def test_map_is_true():
    package = pathlib.Path(deqjax.__file__).parent
    shown = set(re.findall(r"^  (\w+(?:/|\.py)) ", README, re.MULTILINE))
    there = {p.name if p.suffix else f"{p.name}/" for p in package.iterdir()}
    assert shown == there - {"__init__.py", "py.typed", "__pycache__/"}
