"""The machine: what it is, and the rates of which all later ones are shares."""

import os
import platform
from importlib.metadata import distributions, version
from typing import Any

import jax
import jax.numpy as jnp

from bench.accelerator.run import Program, Run, compiled, good, seconds

_PRODUCTS: dict[str, tuple[Any, Any]] = {
    "float32": (jnp.float32, None),
    "float32, highest precision": (jnp.float32, jax.lax.Precision.HIGHEST),
    "bfloat16": (jnp.bfloat16, None),
}
_PACKAGES = ("jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "equinox", "lineax")
_PACKAGES += ("optimistix", "optax", "numpy")
_LOOP = 8


def product(n: int, dtype: Any, precision: Any) -> Program:
    """Products of square matrices, one after the other in a loop."""

    def fn(x, a):
        step = lambda _, x: jnp.matmul(x, a, precision=precision)
        return jax.lax.fori_loop(0, _LOOP, step, x)

    # An orthogonal matrix, so that nothing grows.
    a = jnp.roll(jnp.eye(n, dtype=dtype), 1, 0)
    return fn, (jnp.ones((n, n), dtype), a)


def copy(n: int) -> Program:
    """A loop that reads and writes n bytes each time."""
    step = lambda _, x: x + 1.0
    return lambda x: jax.lax.fori_loop(0, _LOOP, step, x), (jnp.zeros(n // 4),)


def loop(trips: int) -> Program:
    """Steps of a loop that does next to nothing; the program does not know their number."""
    fn = lambda x, n: jax.lax.fori_loop(0, n, lambda _, x: x + 1.0, x)
    return fn, (jnp.zeros(()), jnp.asarray(trips))


def machine(run: Run) -> None:
    def about() -> None:
        device = jax.devices()[0]
        stats = device.memory_stats() or {}
        memory = f", {stats['bytes_limit'] / 2**30:.0f} GiB" if "bytes_limit" in stats else ""
        name = f"{len(jax.devices())} x {device.device_kind}{memory}"
        found = {"device": name, "platform": jax.default_backend()}
        cores = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
        run.add("device", f"{jax.default_backend()}: {name}; {cores}", about=found)
        run.add("JAX", f"{jax.__version__}{_versions()}", about={"jax": jax.__version__})
        run.add("runtime", " ".join(device.client.platform_version.split()))
        run.add("XLA_FLAGS", os.environ.get("XLA_FLAGS", "") or "none")

    def products() -> None:
        n = run.pick(64, 1024, 8192)
        programs = {name: product(n, *how) for name, how in _PRODUCTS.items()}
        calls = {name: good(each).call for name, each in compiled(programs).items()}
        for name, each in seconds(calls, run.pick(1, 5, 10), 10.0).items():
            rate = 2 * n**3 * _LOOP / each
            said = f"{rate / 1e12:.4g} TFLOP/s"
            run.add(f"products of {n} x {n}, {name}", said, rates={name: rate})

    def copies() -> None:
        n = run.pick(2**16, 2**26, 2**30)
        call = good(compiled({"": copy(n)})[""]).call
        taken = seconds({"": call}, run.pick(1, 5, 10), 5.0)[""]
        rate = 2 * n * _LOOP / taken
        run.add(f"copy of {n / 2**20:g} MiB", f"{rate / 1e9:.4g} GB/s", rates={"copy": rate})

    def starts() -> None:
        calls = {str(n): good(compiled({"": loop(n)})[""]).call for n in (0, 1000)}
        taken = seconds(calls, run.pick(1, 20, 20), 5.0)
        run.add("a program that does nothing", f"{taken['0'] * 1e6:.3g} us")
        step = (taken["1000"] - taken["0"]) / 1000
        run.add("a step of an empty loop of unknown length", f"{step * 1e6:.3g} us")

    cases = {"what it is": about, "products": products, "copies": copies, "starts": starts}
    run.cases(cases)


def _versions() -> str:
    there = {package.metadata["Name"].lower() for package in distributions()}
    return "".join(f", {name} {version(name)}" for name in _PACKAGES if name in there)
