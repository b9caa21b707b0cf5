"""The folder of a measuring script: its record, section by section, its claims and its table."""

import dataclasses
import importlib.metadata
import json
import math
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from bench.report import Results
from bench.rows import Row


class Parts(dict[str, Any]):
    """The parts of the results that one section measures, where they are several."""


def record(
    name: str,
    config: Any,
    smoke: dict[str, Any],
    measures: Mapping[Any, Callable[[Any], Any]],
    claims: Callable[[Results], list[Row]],
    tables: Callable[[Results], str],
    *,
    optimised: bool = False,
) -> tuple[Path, Results]:
    """Measures the sections that `config` asks for, over those of an earlier run, and prints.

    `measures` has the function of each section, whose value is that part of the results.
    In a smoke run the options `smoke` are forced, so that it is quick whatever else is asked for;
    it is compiled as others are only where `optimised` asks for that.
    """
    if config.smoke:
        config = dataclasses.replace(config, **smoke)
        jax.config.update("jax_disable_most_optimizations", not optimised)
    out = config.out or Path("runs") / f"{name}{'-smoke' if config.smoke else ''}"
    out.mkdir(parents=True, exist_ok=True)
    file = out / "results.json"
    results: Results = {"runs": {}}
    if file.exists():
        results = json.loads(file.read_text(encoding="utf-8"))
    packages = ("jax", "deqjax", "equinox", "optimistix", "lineax", "jaxopt", "numpy")
    versions = {"python": platform.python_version()} | {p: _version(p) for p in packages}
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    marked = {"smoke": True} if config.smoke else {}
    for section in config.sections:
        start = time.perf_counter()
        found = measures[section](config)
        results |= finite(found if isinstance(found, Parts) else {section: found})
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


def finite(tree: Any) -> Any:
    """Replaces what is not finite by None, since JSON has no NaN."""
    if isinstance(tree, dict):
        return {k: finite(v) for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        return [finite(v) for v in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
