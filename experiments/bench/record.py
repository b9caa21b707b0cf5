"""The folder of a comparison: its record, section by section, its claims and its table."""

import dataclasses
import importlib.metadata
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from gradient_fidelity import finite

from bench.fidelity.report import claims_table

Results = dict[str, Any]
Row = dict[str, Any]


class Claims:
    """Lines of the table of claims. A bound of None: stated, nothing promised."""

    def __init__(self):
        self.lines: list[Row] = []

    def add(self, text: str, measured: float | None, bound: float | None) -> None:
        """`measured=None`: not measured, which neither holds nor fails."""
        said = None if bound is None or measured is None else bool(measured <= bound)
        self.lines.append({"claim": text, "measured": measured, "bound": bound, "holds": said})


def said(lines: list[Row]) -> str:
    """The table of claims; one that could not be measured says so."""
    text = claims_table([line | {"measured": line["measured"]} for line in lines])
    missing = {line["claim"] for line in lines if line["measured"] is None}
    rows = text.splitlines()
    for i, row in enumerate(rows):
        if row.split(" | ")[0][2:] in missing:
            bound = row.split(" | ")[2]
            rows[i] = f"| {row.split(' | ')[0][2:]} | not measured | {bound} | - |"
    return "\n".join(rows)


def record(
    name: str,
    config: Any,
    measure: Callable[[Any, Any], Results],
    claims: Callable[[Results], list[dict[str, Any]]],
    tables: Callable[[Results], str],
) -> tuple[Path, Results]:
    """Measures the sections that `config` asks for, over those of an earlier run, and prints."""
    out = config.out or Path("runs") / f"{name}{'-smoke' if config.smoke else ''}"
    out.mkdir(parents=True, exist_ok=True)
    file = out / "results.json"
    results: Results = {"runs": {}}
    if file.exists():
        results = json.loads(file.read_text(encoding="utf-8"))
    packages = ("jax", "deqjax", "equinox", "optimistix", "lineax", "jaxopt")
    versions = {"python": platform.python_version()} | {p: _version(p) for p in packages}
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    marked = {"smoke": True} if config.smoke else {}
    for section in config.sections:
        start = time.perf_counter()
        results |= finite(measure(section, config))
        seconds = round(time.perf_counter() - start)
        asked = dataclasses.asdict(config) | {"out": str(out)}
        about = {"config": asked, "versions": versions, "device": device, "seconds": seconds}
        results["runs"][section] = about
        results["claims"] = [line | marked for line in claims(results)]
        # After each section, so that a run that is stopped leaves what it has measured.
        text = json.dumps(finite(results), indent=1, allow_nan=False)
        file.write_text(text + "\n", encoding="utf-8")
    (out / "table.md").write_text(tables(results), encoding="utf-8")
    took = ", ".join(f"{key} {run['seconds']} s" for key, run in results["runs"].items())
    print(f"\n{tables(results)}\n{took}, on {device}; {out}/")
    return out, results


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
