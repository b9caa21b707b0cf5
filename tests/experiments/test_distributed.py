"""One run on one device, on eight, and as two processes of four each; and users' own `jax.pmap`."""

import os
import re
import signal
from functools import partial

import jax
import numpy as np
import optax
import pytest
from processes import ROOT, TRAINING, finish, metrics, reach, start, start_two
from tiny_run import ADJOINT, SOLVER, batch_of, initial, loss_fn, train

import deqjax

from training.devices import initialize, mesh, place
from training.fit import make_step

SCRIPT = ROOT / "experiments" / "image_classification.py"
# Twenty steps, of which the last are in the fourth epoch.
OPTIONS = "--smoke --model implicit-resnet --epochs 4 --stop-after 20".split()
NAME = "digits-implicit-resnet-0-smoke"


@pytest.mark.slow
def test_one_device_eight_and_two_processes_of_four_compute_the_same(tmp_path):
    cached = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    runs = {"one": 1, "eight": 8, "two": None}
    for kind, devices in runs.items():
        (tmp_path / kind).mkdir()
        settings = dict(cwd=tmp_path / kind, **cached)
        if devices is None:
            runs[kind] = start_two(SCRIPT, *OPTIONS, **settings)
        else:
            runs[kind] = [start(SCRIPT, *OPTIONS, devices=devices, **settings)]
    # All at once: compilation uses one core at a time.
    *_, main, other = finish([process for run in runs.values() for process in run])
    assert "test accuracy" in main and "test accuracy" not in other
    losses = {}
    for kind in runs:
        assert os.listdir(tmp_path / kind / "runs") == [NAME]
        lines = [x for x in metrics(tmp_path / kind / "runs" / NAME) if "loss" in x]
        assert [line["step"] for line in lines] == [*range(1, 21)]
        losses[kind] = [line["loss"] for line in lines]
    for kind in ("eight", "two"):
        np.testing.assert_allclose(losses[kind], losses["one"], atol=1e-5, rtol=0)


@pytest.mark.slow
def test_sigterm_in_one_process_stops_both_at_the_same_step(tmp_path):
    processes = start_two(TRAINING, "--root", tmp_path, "--seconds", 0.1, "--total", 400)
    reach(processes[0], tmp_path / "tiny", 5)
    processes[1].send_signal(signal.SIGTERM)
    main, other = finish(processes)
    stopped = metrics(tmp_path / "tiny")[-1]["step"]
    assert f"Stopped at step {stopped} of" in main and "Stopped at" not in other
    assert (tmp_path / "tiny" / "checkpoints" / f"{stopped}").exists() and stopped < 400
    # One process with eight devices goes on where two with four each stopped.
    train(tmp_path, total=stopped + 2, resume=True)
    lines = [line["step"] for line in metrics(tmp_path / "tiny") if "loss" in line]
    assert lines == [*range(1, stopped + 3)]


def test_pmap_gives_the_update_of_a_sharded_jit():
    """A step of a user's own, with the gradient averaged over the devices by hand."""
    batch, replicated = mesh()
    optimizer = optax.sgd(0.1)
    step = make_step(loss_fn, optimizer, batch, replicated)
    expected, line = step(initial(optimizer, replicated), *place(batch_of(0), batch))

    @partial(jax.pmap, axis_name="data", in_axes=(None, 0, 0))
    def own(state, x, y):
        _, key = jax.random.split(state.key)
        loss, grads = jax.value_and_grad(lambda w: loss_fn(w, None, key, x, y)[0])(state.params)
        grads, loss = jax.lax.pmean((grads, loss), "data")
        updates, _ = optimizer.update(grads, state.optimizer, state.params)
        return optax.apply_updates(state.params, updates), loss

    shares = [x.reshape(8, -1, *x.shape[1:]) for x in batch_of(0)]
    params, losses = own(initial(optimizer, mesh()[1]), *shares)
    np.testing.assert_allclose(params[0], expected.params, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(params[1:], params[:1].repeat(7, 0))
    np.testing.assert_allclose(losses, np.full(8, line["loss"]), rtol=1e-6)


SOLVES = {
    "picard": (SOLVER, ADJOINT),
    "reversible": (deqjax.Reversible(beta=0.5, rtol=1e-3), deqjax.ReversibleAdjoint()),
}


@pytest.mark.parametrize("solve", SOLVES.values(), ids=SOLVES)
def test_no_collective_inside_a_solve_and_no_callback(solve):
    """Where each example stops by itself; `jit` alone makes the devices agree at every step."""
    batch, replicated = mesh()
    optimizer = optax.sgd(0.1)
    arguments = initial(optimizer, replicated), *place(batch_of(0), batch)

    def compiled(over):
        loss = partial(loss_fn, solver=solve[0], adjoint=solve[1], over=over)
        return make_step(loss, optimizer, batch, replicated).lower(*arguments).compile().as_text()

    text = compiled(batch)
    assert not any("callback" in x for x in re.findall(r'custom_call_target="(.*?)"', text))
    assert "all-reduce" in text and collectives_in_loops(text) == []
    assert "pred[] all-reduce" in "".join(collectives_in_loops(compiled(None)))


def collectives_in_loops(text):
    """The collectives of the computations that loops call, directly or not."""
    computations = dict(re.findall(r"^(?:ENTRY )?%?([\w.-]+) .*?\{$(.*?)^\}", text, re.M | re.S))
    called = r"(?:body|condition|calls|to_apply|\w+_computations?)=\{?((?:%?[\w.-]+(?:, )?)+)"
    names = lambda found: {x.strip("% ") for group in found for x in group.split(",")}
    todo = names(re.findall(r"(?:body|condition)=(%?[\w.-]+)", text))
    assert todo <= computations.keys()
    seen = set()
    while todo:
        name = todo.pop()
        seen.add(name)
        todo |= (names(re.findall(called, computations[name])) & computations.keys()) - seen
    kinds = r"all-reduce|all-gather|all-to-all|reduce-scatter|collective-\w+"
    lines = [line for name in seen for line in computations[name].splitlines()]
    return [line for line in lines if re.search(rf" (?:{kinds})(?:-start)?\(", line)]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((False, "localhost:1", 2, 0), "Expected --distributed beside --coordinator"),
        ((True, "localhost:1", 2, None), "--coordinator, --processes and --process-id together"),
        ((True, None, None, None), "expected to join a cluster, got RuntimeError"),  # too late
    ],
    ids=("undistributed", "incomplete", "late"),
)
def test_what_does_not_fit_together_is_refused(given, said):
    with pytest.raises(SystemExit, match=said):
        initialize(*given)
