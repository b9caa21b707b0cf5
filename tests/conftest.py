"""Eight simulated devices, strict dtypes and shapes, warnings as errors, seeded keys."""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import itertools

import fast_compile
import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
# Most of the time goes into compilation; what is promised to the last bit is marked `optimised`.
jax.config.update("jax_disable_most_optimizations", True)
fast_compile.install()


# Programs that take 0.03 s or more are kept: most of the suite's take less than a second.
_CACHED = {"min_compile_time_secs": 0.03, "min_entry_size_bytes": -1}


def pytest_configure(config):
    """Compiled programs are kept in .pytest_cache for the next module, worker, script and run.

    Without: `JAX_ENABLE_COMPILATION_CACHE=false python -m pytest`, or `-p no:cacheprovider`.
    """
    cache = getattr(config, "cache", None)
    if cache is None or os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    options = {"jax_compilation_cache_dir": str(cache.mkdir("jax"))}
    options |= {f"jax_persistent_cache_{name}": value for name, value in _CACHED.items()}
    for name, value in options.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)  # for the scripts that tests start


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """All cores, up to eight: a worker holds gigabytes of programs. One file runs by itself."""
    files = {argument.partition("::")[0] for argument in config.args}
    alone = len(files) == 1 and files.pop().endswith(".py")
    return 0 if alone else min(os.cpu_count() or 1, 8)


@pytest.fixture
def getkey():
    """A function that gives a new key at each call, the same ones in each run."""
    seeds = itertools.count(2025)
    return lambda: jax.random.key(next(seeds))


@pytest.fixture(autouse=True)
def compilation(request):
    """float64 for tests marked `x64`, and XLA as users have it for those marked `optimised`."""
    marked = lambda name: request.node.get_closest_marker(name) is not None
    if marked("optimised"):
        jax.clear_caches()  # in which programs are not told apart by this setting
    jax.config.update("jax_disable_most_optimizations", not marked("optimised"))
    with jax.enable_x64(marked("x64")):
        yield
    # As in the fixtures of a module, which are made before those of its first test.
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Every compiled program holds maps of memory, of which Linux gives a process 65,530."""
    yield
    jax.clear_caches()
