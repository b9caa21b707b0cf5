"""The lines that the sections of `accelerator.py` write, and the table that is made of them.

Needs nothing but Python: the process that reads the lines never starts an accelerator.
"""

import json
from pathlib import Path
from typing import Any

Line = dict[str, Any]

RED, LATE = "red", "not reached"
COLUMNS = ("section", "case", "value", "limit", "verdict")


def read(path: Path) -> list[Line]:
    """Reads all whole lines; the last one may have been cut off."""
    found = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            found.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return found


def write(path: Path, line: Line) -> None:
    """Appends a line at once, so that nothing is lost with the process."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def forget(path: Path, sections: list[str]) -> None:
    """Drops what earlier runs found of these sections, and keeps the rest."""
    kept = [line for line in read(path) if line["section"] not in sections]
    path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")


def begun(lines: list[Line], section: str) -> list[str]:
    """The cases of a section that were started, in order."""
    return [line["start"] for line in lines if line["section"] == section and "start" in line]


def running(lines: list[Line], section: str) -> str | None:
    """The case that was started last and has not ended."""
    names = begun(lines, section)
    ended = {line["done"] for line in lines if line["section"] == section and "done" in line}
    return names[-1] if names and names[-1] not in ended else None


def rows(lines: list[Line], sections: list[str]) -> list[Line]:
    """The rows of the table: all that was measured, and all that was planned and not reached."""
    found = []
    for section in sections:
        mine = [line for line in lines if line["section"] == section]
        found += [line for line in mine if "verdict" in line]
        planned = [name for line in mine for name in line.get("plan", ())]
        ended = {line["done"] for line in mine if "done" in line}
        ended |= {line["case"] for line in mine if line.get("verdict") in (RED, LATE)}
        left = [name for name in dict.fromkeys(planned) if name not in ended]
        found += [row(section, name, verdict=LATE) for name in left]
        if not mine:
            found.append(row(section, "all of it", verdict=LATE))
    return found


def row(section: str, case: str, value: str = "", limit: str = "", verdict: str = "") -> Line:
    return dict(zip(COLUMNS, (section, case, value, limit, verdict), strict=True))


def table(found: list[Line], about: str) -> str:
    """The table in Markdown, with the faults first."""
    count = lambda verdict: sum(line["verdict"] == verdict for line in found)
    said = f"{count(RED)} red, {count('ok')} ok, {count(LATE)} not reached"
    lines = [f"{about}{said}: what is red is a fault.", ""]
    reds = [line for line in found if line["verdict"] == RED]
    for some in (reds, found) if reds else (found,):
        text = [[str(line.get(name) or "").replace("|", "/") for name in COLUMNS] for line in some]
        widths = [max(map(len, column)) for column in zip(COLUMNS, *text, strict=True)]
        whole = [list(COLUMNS), ["-" * w for w in widths], *text]
        lines += [
            "| " + " | ".join(x.ljust(w) for x, w in zip(each, widths, strict=True)) + " |"
            for each in whole
        ]
        lines.append("")
    return "\n".join(lines)
