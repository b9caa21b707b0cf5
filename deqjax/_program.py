"""Compiled programs of eager calls, looked up by what was traced.

`jax.jit` with the user's function as a static argument compares functions by `==`: it runs a bound
method, or a function that reads a global, as it was at its first call, and keeps its arrays and its
program for ever. Here a function is traced at each call, and `deqjax._traced.Traced` compares what
it does.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import equinox as eqx
import jax

from ._compare import Fleeting, static_fields, static_key
from ._traced import Traced

# A program holds some dozens of memory maps; Linux gives a process 65,530.
_MOST = 64
_programs: OrderedDict[Hashable, Callable] = OrderedDict()
_lock = threading.Lock()


class _Rest:
    """The part of a program's result that is not arrays; JAX does not look into it."""

    def __init__(self, tree: Any):
        self.tree = tree


class _Out(eqx.Module):
    arrays: Any
    rest: _Rest = eqx.field(static=True)


def run(engine: Callable, *inputs: Any) -> Any:
    """Runs `engine(*inputs)` jitted: arrays are arguments of the program, all else is in its key.

    Functions must be passed as `Traced`. Calls inside another program share programs too; JAX then
    traces and lowers a shared one once.
    """
    leaves, treedef = jax.tree.flatten(inputs)
    dynamic = [x for x in leaves if eqx.is_array(x)]
    static = [None if eqx.is_array(x) else x for x in leaves]
    program = _program(engine, inputs, static, treedef)
    try:
        # Only a list of arrays is passed: JAX's caches keep the structure of every argument.
        out = program(dynamic)
    except jax.errors.JaxRuntimeError as error:
        # Raise a message of `eqx.error_if` as `eqx.filter_jit` does.
        _, found, message = str(error).partition("_EquinoxRuntimeError: ")
        if not found:
            raise
        raise eqx.EquinoxRuntimeError(message.partition("\n")[0]) from None
    return eqx.combine(out.arrays, out.rest.tree)


def _program(engine: Callable, inputs: tuple, static: list, treedef: Any) -> Callable:
    key = _key(engine, inputs, static, treedef)
    if key is None:
        return _compiled(engine, static, treedef)
    with _lock:
        program = _programs.pop(key, None) or _compiled(engine, static, treedef)
        _programs[key] = program  # as the most recently used, which is removed last
        if len(_programs) > _MOST:
            _programs.popitem(last=False)
    return program


def _compiled(engine: Callable, static: list, treedef: Any) -> Callable:
    def call(dynamic):
        left = iter(dynamic)
        leaves = [next(left) if x is None else x for x in static]
        out = engine(*jax.tree.unflatten(treedef, leaves))
        arrays, rest = eqx.partition(out, eqx.is_array)
        return _Out(arrays, _Rest(rest))

    call.__name__ = engine.__name__.lstrip("_")  # shown in a profile
    return jax.jit(call)


def _key(engine: Callable, inputs: tuple, static: list, treedef: Any) -> Hashable | None:
    is_function = lambda x: isinstance(x, Traced)
    functions = filter(is_function, jax.tree.leaves(inputs, is_leaf=is_function))
    if any(fn.body.key is None for fn in functions):
        return None
    try:
        fields = tuple(map(static_key, static_fields(inputs)))
        return engine, treedef, fields, tuple(map(static_key, static))
    except Fleeting:
        return None
