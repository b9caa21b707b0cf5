"""The promises that hold for throughput, and tables of all that was measured."""

from collections.abc import Callable

from bench.report import Claims, Results, claims_table, table
from bench.rows import Row, mib, pick, values

SECTIONS = ("language", "multiscale")
TITLES = {
    "exact": "exact reversal",
    "isolated": "exact reversal, f isolated",
    "float": "float reversal",
    "checkpointed": "checkpointed autodiff",
    "explicit": "explicit, unrolled",
    "explicit, checkpointed": "explicit, unrolled, checkpointed",
}


def totals(rows: list[Row]) -> list[Row]:
    """The sum of the times over the scales, and the largest of their memories."""
    keys = ("variant", "dtype", "batch", "evaluations")
    found = []
    for case in values(rows, *keys):
        mine = pick(rows, **dict(zip(keys, case, strict=True)))
        total = dict(mine[0]) | {"bytes": max(row["bytes"] for row in mine)}
        for name in ("seconds", "floor", "floor in a loop", "flop"):
            parts = [row[name] for row in mine]
            total[name] = None if None in parts else sum(parts)
        found.append(total)
    return found


def ratio(row: Row, to: str = "floor") -> float | None:
    return None if row["seconds"] is None or row[to] is None else row["seconds"] / row[to]


def worst(rows: list[Row], to: str = "floor") -> float | None:
    return max((x for row in rows if (x := ratio(row, to)) is not None), default=None)


def flatness(rows: list[Row], counted: Callable[[Row], int]) -> float:
    """Bytes at the most evaluations / at the fewest, of the scale where they grow most."""
    fewest, *_, most = sorted({row["evaluations"] for row in rows})
    pairs = zip(pick(rows, evaluations=most), pick(rows, evaluations=fewest), strict=True)
    return max(counted(deep) / counted(shallow) for deep, shallow in pairs)


def claims(results: Results) -> list[Row]:
    """The lines that must hold on a CPU, as far as measured; elsewhere the same is stated."""
    lines = Claims()
    for section in SECTIONS:
        if section not in results:
            continue
        found = results[section]
        rows, n, cpu = found["blocks"], found["evaluations"], found["platform"] == "cpu"
        single = totals(pick(rows, dtype="float32", evaluations=n))
        for variant in ("exact", "isolated", "float"):
            mine = pick(single, variant=variant)
            if not mine:
                continue
            text = f"{section}: {variant} state, time / floor, worst of {len(mine)} batches"
            lines.add(text, worst(mine), 1.15 if cpu else None)
            text = f"{section}: {variant} state, time / floor in a loop"
            lines.add(text, worst(mine, "floor in a loop"), None)
        exact, real = (
            [row["seconds"] for row in pick(single, variant=variant)]
            for variant in ("exact", "float")
        )
        if exact and real and None not in (*exact, *real):
            ratios = [a / b for a, b in zip(exact, real, strict=True)]
            text = f"{section}: exact state, time / that of the float state, worst"
            lines.add(text, max(ratios), 1.02 if cpu else None)
        for variant in ("exact", "isolated"):
            deep = pick(rows, dtype="float32", batch=single[0]["batch"], variant=variant)
            depths = sorted({row["evaluations"] for row in deep})
            if len(depths) > 1:
                # Guard digits grow with depth: 1 byte an entry and evaluation.
                bound = 1.1 if variant == "isolated" else None
                text = (
                    f"{section}: {variant} state, temporary bytes at {depths[-1]} / at {depths[0]}"
                )
                lines.add(text, flatness(deep, lambda row: row["bytes"]), bound)
                text = f"{section}: {variant} state, the same without the digits, worst scale"
                lines.add(text, flatness(deep, lambda row: row["bytes"] - row["digits"]), 1.02)
        other = {row["variant"]: row for row in single if row["batch"] == single[0]["batch"]}
        for variant in [v for v in ("checkpointed", "explicit") if v in other]:
            for name in ("seconds", "bytes"):
                a, b = other["exact"][name], other[variant][name]
                text = f"{section}: exact state, {name} / those of {TITLES[variant]}"
                lines.add(text, None if None in (a, b) else a / b, None)
    return lines.lines


def tables(results: Results) -> str:
    """All that was measured, as Markdown."""
    parts = [results["machine"], claims_table(results["claims"])]
    for section in SECTIONS:
        if section not in results:
            continue
        found = results[section]
        parts += [f"## {section.capitalize()}: {found['size']}", NOTES[section]]
        unit = found["unit"]
        parts += ["Solves alone:", _table(totals(found["blocks"]), unit, floor=True)]
        asked = {"dtype": "float32", "evaluations": found["evaluations"], "variant": "exact"}
        scales = pick(found["blocks"], **asked)
        if len(values(scales, "scale")) > 1:
            parts += ["Exact reversal, each scale:", _scales(scales)]
        parts += ["Whole model, its loss and the gradient:", _table(found["models"], unit)]
    return "\n\n".join([*parts, NOTE]) + "\n"


def _table(rows: list[Row], unit: str, *, floor: bool = False) -> str:
    lines = []
    for row in rows:
        seconds = row["seconds"]
        rate = None if seconds is None else row["units"] / seconds
        line = {
            "value and gradient": TITLES[row["variant"]],
            "dtype": row["dtype"],
            "batch": row["batch"],
            "evaluations": row["evaluations"],
            f"{unit} / s": f"{rate:,.{0 if rate >= 100 else 1}f}" if rate else "does not fit",
            "ms": "-" if seconds is None else f"{1e3 * seconds:.1f}",
            "MiB": mib(row["bytes"]),
        }
        if floor:
            line |= {"/ floor": two(ratio(row))}
            line |= {"/ floor in a loop": two(ratio(row, "floor in a loop"))}
            line |= {"share of matrix rate": share(row)}
        lines.append(line)
    return table(lines)


def _scales(rows: list[Row]) -> str:
    line = lambda row: {
        "scale": row["scale"],
        "batch": row["batch"],
        "ms": f"{1e3 * row['seconds']:.2f}",
        "ms of f": f"{1e3 * row['f']:.2f}",
        "ms of f with VJP": f"{1e3 * row['vjp']:.2f}",
        "/ floor": two(ratio(row)),
        "MiB": mib(row["bytes"]),
        "share": share(row),
    }
    return table([line(row) for row in rows])


def two(x: float | None) -> str:
    return "-" if x is None else f"{x:.2f}"


def share(row: Row) -> str:
    """The products of the floor a second, of those of one large product of the same dtype."""
    if row["seconds"] is None:
        return "-"
    return f"{row['flop'] / row['seconds'] / row['rate']:.0%}"


NOTES = {
    "language": "1 - beta = 1/2; parameters and state float32, products in the dtype.",
    "multiscale": "1 - beta = 1/5; parameters and state float32, convolutions in the dtype. Times "
    "are sums over the scales, MiB that of the largest.",
}
NOTE = """\
Floor: evaluations x (one f with its VJP, cotangents added up, and so many f as the variant needs
beside: exact and float 1, isolated and checkpointed autodiff 2, explicit 0 or, checkpointed, 1),
each compiled alone, called 8 times in a row and timed in the same rounds; alone, a piece is given
new memory at each call, in a loop it is not.
MiB: temporary memory of the compiled program.
Share: the matrix products and convolutions of the floor, f with its VJP counting as three f, a
second, of those of one large matrix product of the same dtype.
Float reversal is the textbook's, unchecked: its gradient is lost at depth
(results/gradient_fidelity.md).
On a CPU bfloat16 is for the most part emulated, and XLA merges what checkpointing a stack would
recompute with what it stored."""
