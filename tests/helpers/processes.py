"""Real processes: started, waited for, stopped."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from fast_compile import FLAGS

ROOT = Path(__file__).parents[2]
TRAINING = ROOT / "tests" / "helpers" / "tiny_run.py"


def start(script, *options, devices=8, cwd=None, **variables):
    """Start a script as a process on so many simulated devices, with what it says in `stdout`."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "experiments")]),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}" + FLAGS,
    }
    command = [sys.executable, str(script), *map(str, options)]
    pipes: Any = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, cwd=cwd, env=environment | variables, **pipes)


def runner(script, cache):
    """`run(folder, *options, devices=1, **variables)` runs a script with --smoke to its end.

    Compiled programs are shared, in the cache of pytest or else in the folder `cache`."""
    shared = {
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_PLATFORMS": "cpu",
    }

    def run(folder, *options, devices=1, **variables):
        flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}" + FLAGS}
        command = [sys.executable, str(script), "--smoke", *options]
        environment = os.environ | shared | flags | variables
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)

    return run


def measured(script, folder, *options, **variables):
    """Run a measuring script with --smoke to its end, where every warning is an error."""
    environment = os.environ | {
        "JAX_NUMPY_RANK_PROMOTION": "raise",
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": FLAGS,
    }
    command = [sys.executable, "-W", "error", str(script), "--smoke", "--out", "out", *options]
    environment |= variables
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def reach(process, folder, step):
    """Wait until the metrics of a step are written."""
    for _ in range(1200):
        file = folder / "metrics.jsonl"
        if file.exists() and any(line["step"] >= step for line in metrics(folder)):
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)
    raise AssertionError(f"step {step} was not reached in two minutes")


def metrics(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    lines = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


def start_two(script, *options, **settings):
    """Start it as two processes of one run, with four devices each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    options = (*options, "--distributed", "--coordinator", coordinator, "--processes", 2)
    return [start(script, *options, "--process-id", i, devices=4, **settings) for i in range(2)]


def finish(processes, timeout=240):
    """The output of each, once all have ended with status 0."""
    try:
        said = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), said
    return said
