"""Options of XLA with which most programs take a third of the time to compile.

For tests in which it does not matter how loops are emitted: all that are not marked `optimised`.
"""

import jax

try:  # JAX has no public setting for options of XLA that can change from test to test
    import jax._src.compiler as compiler

    assert callable(compiler.get_compile_options)
except (ImportError, AttributeError):
    compiler = None


def _known(option):
    try:
        return bool(jax.jit(lambda: 0, compiler_options=dict([option])).lower().compile())
    except jax.errors.JaxRuntimeError:  # of an XLA that no longer has the older emitters
        return False


_WANTED = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}
OPTIONS = [*filter(_known, _WANTED.items())]
FLAGS = "".join(f" --{name}={str(value).lower()}" for name, value in OPTIONS)  # for a process


def install():
    """Compiles with them wherever `jax_disable_most_optimizations` is set, if this JAX lets us."""
    if compiler is None:
        return
    usual = compiler.get_compile_options

    def get_compile_options(*args, **kwargs):
        found = usual(*args, **kwargs)
        if found.executable_build_options.debug_options.xla_backend_optimization_level == 0:
            found.env_option_overrides += OPTIONS
        return found

    compiler.get_compile_options = get_compile_options
