"""Tables and claims as every measuring script prints them."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from bench.rows import Row, show

Results = dict[str, Any]
F = TypeVar("F", bound=Callable[..., Any])


def markdown(rows: Sequence[Sequence[Any]]) -> str:
    """A table; the first row is its head, all columns but the first are numbers."""
    head, *rest = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join([head, "|" + "---|" + "---:|" * (len(rows[0]) - 1), *rest])


def table(rows: Sequence[Row]) -> str:
    """A line per row, whose keys are the titles of the columns."""
    if not rows:
        return "none"
    return markdown([list(rows[0]), *(list(row.values()) for row in rows)])


def claims_table(lines: list[Row]) -> str:
    # A smoke run promises nothing, and what happens to hold is no news either.
    said = {True: "yes", False: "**no**", None: "stated"}
    holds = lambda line: "too small to say" if line.get("smoke") else said[line["holds"]]
    rows = [["must hold", "measured", "at most", "holds"]]
    for line in lines:
        known = line["measured"] is not None
        found = [show(line["measured"]) if known else "not measured", show(line["bound"])]
        rows.append([line["claim"], *found, holds(line) if known else "-"])
    return markdown(rows)


class Claims:
    """Lines of the table of claims. A bound of None: stated, nothing promised."""

    def __init__(self):
        self.lines: list[Row] = []

    def add(self, text: str, measured: float | None, bound: float | None) -> None:
        """`measured=None`: not measured, which neither holds nor fails."""
        said = None if bound is None or measured is None else bool(measured <= bound)
        self.lines.append({"claim": text, "measured": measured, "bound": bound, "holds": said})


class Report:
    """The claims and tables of a script, each made of the sections of the results that it names.

    They are registered by decorators, and stand in the order of their functions.
    """

    def __init__(self, note: str = ""):
        self._note = note
        self._claims: list[tuple[str, Callable[..., None]]] = []
        self._tables: list[tuple[str, tuple[str, ...], Callable[..., str]]] = []

    def claim(self, section: str) -> Callable[[F], F]:
        """Registers `add(claims, found)`, which adds the lines of a section."""

        def register(add: F) -> F:
            self._claims.append((section, add))
            return add

        return register

    def table(self, title: str, *sections: str) -> Callable[[F], F]:
        """Registers `make(*found)`, which gives Markdown; without a title it has its own."""

        def register(make: F) -> F:
            self._tables.append((title, sections, make))
            return make

        return register

    def claims(self, results: Results) -> list[Row]:
        """The lines of each section that was measured."""
        claims = Claims()
        for section, add in self._claims:
            if section in results:
                add(claims, results[section])
        return claims.lines

    def tables(self, results: Results) -> str:
        """All tables as Markdown."""
        parts = [claims_table(results["claims"])]
        for title, sections, make in self._tables:
            if results.keys() >= set(sections):
                parts += [f"## {title}"] * bool(title)
                parts.append(make(*(results[name] for name in sections)))
        return "\n\n".join([*parts, self._note] if self._note else parts) + "\n"
