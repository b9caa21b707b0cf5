"""The command line of every script: read before anything that is slow to import, and checked.

A field of a dataclass of options says in its annotation what numbers it takes (`Range`) and which
other options have to be as they are for it to be read at all (`Only`).
"""

import dataclasses
import functools
import typing
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

from training.missing import not_installed

try:
    import tyro
except ImportError as missing:
    raise not_installed(missing) from None


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both of them among these; NaN is in no range."""

    low: float
    high: float
    but: tuple[float, ...] = ()
    """Numbers in between that are left out."""
    multiple: int = 1

    def expected(self, number: float) -> str | None:
        """The words for what is expected instead of this number; None if it is in the range."""
        if not number >= self.low:
            return "above 0" if self.low == _SMALL else f"of at least {self.low:,.12g}"
        if not number <= self.high:
            return f"of at most {self.high:,.12g}"
        if number in self.but:
            return f"other than {', '.join(map(str, self.but))}"
        if self.multiple > 1 and number % self.multiple:
            return f"that is a multiple of {self.multiple}"
        return None


@dataclasses.dataclass(frozen=True)
class Only:
    """The option is read only where another one is among `values`."""

    option: str
    values: tuple[Any, ...]

    def met(self, options: Any) -> bool:
        return getattr(options, self.option) in self.values


_SMALL, _LARGE = 1e-30, 3e38  # float32 neither loses them nor overflows
Count = Annotated[int, Range(1, 2**31 - 1)]
Whole = Annotated[int, Range(0, 2**31 - 1)]
Positive = Annotated[float, Range(_SMALL, _LARGE)]
Nonnegative = Annotated[float, Range(0, _LARGE)]
Tolerance = Annotated[float, Range(_SMALL, 1)]
Share = Annotated[float, Range(0, 1)]
Beta = Annotated[float, Range(0, 2, but=(0, 1, 2))]  # of a relaxation that can be reversed
# JAX's keys are made of 32 bits, and NumPy's generators of no negative number.
Seed = Annotated[int, Range(0, 2**32 - 1)]
# The d of 1 - beta = 1/d, where deqjax.Reversible is exact.
Inverse = Annotated[int, Range(-(2**16), 2**16, but=(-1, 0, 1))]

C = TypeVar("C")


@functools.cache
def read(kind: type[C]) -> C:
    """The options of the command line, once: asked again, it gives the same."""
    options = tyro.cli(kind)
    check(options)
    return options


def check(options: Any) -> None:
    """Refuses a number out of its range, and an option of several values that has none."""
    for name, notes in notes_of(type(options)).items():
        value = getattr(options, name)
        if value == ():
            raise SystemExit(f"Expected at least one value of {flag(name)}, got none. Add one.")
        for number in value if isinstance(value, tuple) else (value,):
            for note in notes:
                numeric = isinstance(note, Range) and isinstance(number, int | float)
                expected = note.expected(number) if numeric else None
                if expected is not None:
                    raise SystemExit(
                        f"Expected {flag(name)} {expected}, got {number}. Pass such a number, or "
                        "leave it out."
                    )


def check_read(given: Any, runs: Sequence[Any]) -> None:
    """Refuses an option that was given and that none of the runs, all options filled in, reads."""
    for name, conditions in _conditions(given).items():
        unmet = [next((only for only in conditions if not only.met(run)), None) for run in runs]
        only, value = unmet[0], getattr(given, name)
        if only is not None and None not in unmet:
            raise SystemExit(
                f"Expected no {flag(f'no-{name}' if value is False else name)} beside "
                f"{flag(only.option)} {getattr(runs[0], only.option)}, which does not read it, got "
                f"{value}. It goes with {', '.join(map(str, only.values))}: leave it out, or "
                f"choose one of these."
            )


def without_unread(options: C) -> C:
    """Puts the default in place of each option that another, known already, leaves unread."""
    known = lambda only: getattr(options, only.option) is not None
    unread = {
        name: _default(options, name)
        for name, conditions in _conditions(options).items()
        if any(known(only) and not only.met(options) for only in conditions)
    }
    return dataclasses.replace(typing.cast(Any, options), **unread)


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def notes_of(kind: type) -> dict[str, list[Any]]:
    """`Range` and `Only` of each field, wherever in its annotation they stand."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: _notes(hints[field.name]) for field in dataclasses.fields(kind)}


def _notes(hint: Any) -> list[Any]:
    inner = [note for part in typing.get_args(hint) for note in _notes(part)]
    mine = [x for x in getattr(hint, "__metadata__", ()) if isinstance(x, Range | Only)]
    return mine + [note for note in inner if note not in mine]


def _conditions(options: Any) -> dict[str, list[Only]]:
    """The conditions of what has been given: of what is not at its default."""
    return {
        name: [note for note in notes if isinstance(note, Only)]
        for name, notes in notes_of(type(options)).items()
        if getattr(options, name) != _default(options, name)
    }


def _default(options: Any, name: str) -> Any:
    return next(field.default for field in dataclasses.fields(options) if field.name == name)
