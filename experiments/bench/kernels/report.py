"""What `kernels.py` says."""

from typing import Any

from bench.report import Claims, Results, markdown, said


def claims(results: Results) -> list[dict[str, Any]]:
    lines = Claims()
    if "convolution" in results:
        filtered = [r for r in results["convolution"] if r["channels"] >= 32 and r["pixels"] >= 8]
        for part, what in (("f", "value"), ("vjp", "value and cotangents")):
            text = f"convolution by minimal filtering: {what}, time / the direct sums', worst"
            lines.add(text, max(row[f"{part}, ours / sums"] for row in filtered), 0.95)
    if "attention" in results:
        rows = {row["way"]: row["over by hand"] for row in results["attention"]}
        for way in ("float", "float, jax.vmap", "exact"):
            bound = None if way == "exact" else 0.8
            lines.add(f"attention: {way}, time / that of a loop by hand", rows[way], bound)
    if "concave" in results:
        peer = {row["way"]: row["over PyTorch"] for row in results["concave"]["peer"]}
        best = [v for k, v in peer.items() if v is not None and k != "PyTorch"]
        text = "concave convolution: value and gradient, time / PyTorch's, best"
        lines.add(text, min(best) if best else None, 0.8)
        for row in results["concave"]["steps"]:
            if row["method"] == "Anderson":
                text = f"a step of Anderson, {row['state']}, in evaluations of the cell"
                lines.add(text, row["over f"], 1.3)
    return lines.lines


def tables(results: Results) -> str:
    parts = [said(results["claims"])]
    titles = {
        "convolution": "Convolution, 3 x 3: an evaluation in a loop",
        "attention": "Value and gradient of a reversible solve",
        "peer": "Value and gradient of a positive concave convolution",
        "steps": "A step of a solve, in evaluations",
    }
    found = {**results, **results.get("concave", {})}
    for name, title in titles.items():
        if name in found:
            parts += [f"## {title}", _table(found[name])]
    return "\n\n".join(parts) + "\n"


def _table(rows: list[dict[str, Any]]) -> str:
    text = lambda x: "-" if x is None else f"{x:.3g}" if isinstance(x, float) else str(x)
    return markdown([list(rows[0]), *([text(x) for x in row.values()] for row in rows)])
