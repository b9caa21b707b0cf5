"""The rules of the house: imports point one way, none is inside a function, classes are flat."""

import ast
import collections
import dataclasses
import graphlib
import pathlib

import equinox as eqx

import deqjax

ROOT = pathlib.Path(deqjax.__file__).parent
# The way of the data: what is here imports only what stands before it. A name without an underscore
# is a room, whose files import one another without a cycle.
ORDER = [
    "_checks",
    "_tree",
    "_step",
    "_solution",
    "_bilinear",
    "_compare",
    "_traced",
    "_program",
    "_problem",
    "_iterate",
    "positive",
    "solvers",
    "adjoints",
    "_fixed_point",
    "diagnostics",
    "nn",
    "models",
    "__init__",
]
FILES = sorted(ROOT.rglob("*.py"))


def module(path):
    """`("nn", "_conv")` for nn/_conv.py, `("_tree",)` for _tree.py."""
    return path.relative_to(ROOT).with_suffix("").parts


def imported(path, tree):
    """The deqjax modules that a file imports, as paths in the package."""
    package = module(path)[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = package[: len(package) - node.level + 1]
            target = above + tuple(node.module.split(".") if node.module else ())
            # `from . import nn` names modules, `from ._x import X` names what is in one.
            yield from [(*target, a.name) for a in node.names] if not node.module else [target]
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = (
                [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            )
            assert not any(n and n.split(".")[0] == "deqjax" for n in names), (
                path,
                "absolute import",
            )
            assert not any(n and n.startswith("jax._src") for n in names), (path, "private import")


def test_imports_point_one_way():
    rooms = collections.defaultdict(lambda: collections.defaultdict(set))
    for path in FILES:
        room, *inner = module(path)
        for target in imported(path, ast.parse(path.read_text())):
            if target[0] != room:
                assert ORDER.index(target[0]) < ORDER.index(room), (path, target)
            else:
                rooms[room][tuple(inner)].add(target[1:])
    for files in rooms.values():
        graphlib.TopologicalSorter(files).prepare()  # CycleError names the cycle


def test_no_import_inside_a_function():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                inside = [n for n in ast.walk(node) if isinstance(n, ast.Import | ast.ImportFrom)]
                assert not inside, (path, node.lineno)


def subclasses(cls):
    return {cls, *(s for c in cls.__subclasses__() for s in subclasses(c))}


def test_classes_are_abstract_or_final():
    """And all fields and the constructor sit in one class: the final one."""
    ours = [c for c in subclasses(eqx.Module) if c.__module__.startswith("deqjax.")]
    assert len(ours) > 5
    for cls in ours:
        abstract = bool(cls.__abstractmethods__) or cls.__name__.startswith("Abstract")
        derived = [c for c in ours if cls in c.__mro__[1:]]
        assert abstract or not derived, (cls, "is neither abstract nor final")
        if abstract:
            assert "__init__" not in vars(cls) or not dataclasses.fields(cls), cls


def test_files_stay_small():
    for path in FILES:
        assert len(path.read_text().splitlines()) <= 250, path


def test_the_corridor_and_the_scripts_are_few():
    """The corridor and the scripts: a file that one room alone uses is in that room."""
    assert len(list(ROOT.glob("*.py"))) <= 12
    experiments = pathlib.Path(__file__).parents[1] / "experiments"
    files = [path for path in experiments.iterdir() if path.is_file()]
    assert len(files) <= 12 and {path.suffix for path in files} == {".py", ".md"}
    for path in files:
        if path.suffix == ".py":
            assert f"python experiments/{path.name}" in path.read_text(), "its command"


def test_every_public_method_says_what_it_does():
    """An override by the docstring of what it overrides."""
    bases, said = {}, {}
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                bases[node.name] = [getattr(b, "id", getattr(b, "attr", None)) for b in node.bases]
                methods = [m for m in node.body if isinstance(m, ast.FunctionDef)]
                said[node.name] = {m.name: ast.get_docstring(m) for m in methods}
    assert len(said) > 80

    def documented(cls, name):
        if cls not in said:  # of Optimistix and paramax
            return name in ("apply", "init", "step", "terminate", "postprocess", "unwrap")
        return bool(said[cls].get(name)) or any(documented(base, name) for base in bases[cls])

    for cls, methods in said.items():
        for name in methods:
            assert cls[0] == "_" or name[0] == "_" or documented(cls, name), (cls, name)
