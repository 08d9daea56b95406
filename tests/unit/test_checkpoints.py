# SPDX-License-Identifier: Apache-2.0
"""Saved, killed, restored: the run goes on bit for bit, or a message says why it cannot."""

import json
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import flax.serialization
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest

import dpsgd_optax as dpo
from dpsgd_optax.diagnostics.checkpoint import STATE_VERSION
from tests.conformance.rows import CALM, ROWS, TRANSFORMS, same, transform
from tests.table import OPTIMIZERS, PARAMS, compiled

ROOT = Path(__file__).parents[2]


def test_every_state_continues_bit_for_bit_after_orbax(tmp_path):
  """Three steps, save, restore, three more: the six steps of an uninterrupted run. All states in one tree."""
  runs = {name: compiled(name).run(PARAMS, compiled(name).tx.init(PARAMS), [CALM] * 3)[:2] for name in OPTIMIZERS}
  others = {name: transform(name).init(PARAMS) for name in TRANSFORMS}
  tree = {"runs": runs, "others": others}
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "all", tree)
    checkpointer.wait_until_finished()
    fresh = {name: jax.eval_shape(ROWS[name].make().init, PARAMS) for name in ROWS}
    shapes = {"runs": {name: (PARAMS, fresh[name]) for name in runs}, "others": {name: fresh[name] for name in others}}
    restored = checkpointer.restore(tmp_path / "all", jax.eval_shape(lambda x: x, shapes))
  assert jax.tree.structure(restored) == jax.tree.structure(tree)
  same(restored, tree)
  for name, (params, state) in restored["runs"].items():
    same(compiled(name).run(params, state, [CALM] * 3), compiled(name).run(*runs[name], [CALM] * 3))


@pytest.mark.parametrize("name", ROWS)
def test_the_layout_of_a_state_survives_json_and_fits_its_own_optimizer(name):
  state = jax.eval_shape(transform(name).init, PARAMS)
  saved = json.loads(json.dumps(dpo.diagnostics.state_layout(state)))
  assert saved["state_version"] == STATE_VERSION and set(saved["versions"]) == {"dpsgd_optax", "optax", "jax"}
  dpo.diagnostics.check_state_layout(saved, jax.eval_shape(ROWS[name].make().init, PARAMS))


def shapes_of(tx):
  return jax.eval_shape(tx.init, PARAMS)


REFUSED = {
  "other params": (
    lambda saved: saved,
    lambda: jax.eval_shape(dpo.psgd(0.1).init, {**PARAMS, "c": jnp.zeros(7)}),
    ("2_float32", "not there here"),
  ),
  "another group": (
    lambda saved: saved,
    lambda: shapes_of(dpo.psgd(0.1, dpo.diagonal())),
    ("/q/0", "not there here", "more"),
  ),
  "an older layout": (
    lambda saved: {**saved, "state_version": 0},
    lambda: shapes_of(dpo.psgd(0.1)),
    ("layout version 0", f"reads {STATE_VERSION}"),
  ),
  "the first layout": (
    lambda saved: {name: saved[name] for name in ("versions", "leaves")} | {"state_version": 1},
    lambda: shapes_of(dpo.psgd(0.1)),
    ("layout version 1", "since then: the PRNG key is raw data (uint32) in place of a typed key", "`dropped`"),
  ),
  "another geometry": (
    lambda saved: saved,
    lambda: shapes_of(dpo.psgd(0.1, dpo.kron(geometry=dpo.eq))),
    ("0/preconditioner is fitted with geometry=", "in the checkpoint and geometry=eq here"),
  ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_state_that_does_not_fit_is_refused_with_a_way_out(case):
  change, now, words = REFUSED[case]
  saved = {**dpo.diagnostics.state_layout(shapes_of(dpo.psgd(0.1)))}
  saved["versions"] = {**saved["versions"], "dpsgd_optax": "0.0.9"}
  with pytest.raises(ValueError) as error:
    dpo.diagnostics.check_state_layout(change(saved), now())
  message = str(error.value)
  for word in (*words, "dpsgd_optax 0.0.9", "pip install dpsgd_optax==0.0.9", "tx.init(params)"):
    assert word in message, message


MEANINGS = {
  "kron": dpo.kron,
  "affine": dpo.affine,
  "blocked": lambda **kw: dpo.blocked(dpo.kron(max_skew=jnp.inf, **kw), 2),
  "bfloat16": lambda **kw: dpo.kron(state_dtype=jnp.bfloat16, **kw),
  "dense": dpo.dense,
  "damped_kron": dpo.damped_kron,
}


@pytest.mark.parametrize("wrapped", [lambda tx: tx, lambda tx: optax.MultiSteps(tx, 2), lambda tx: optax.chain(tx, tx)])
@pytest.mark.parametrize("name", MEANINGS)
def test_a_state_of_another_geometry_is_refused_though_its_shapes_are_the_same(name, wrapped):
  saved, here = (shapes_of(wrapped(dpo.psgd(0.1, MEANINGS[name](geometry=g)))) for g in (dpo.qeq, dpo.quad))
  assert dpo.diagnostics.state_layout(saved)["leaves"] == dpo.diagnostics.state_layout(here)["leaves"]
  dpo.diagnostics.check_state_layout(dpo.diagnostics.state_layout(saved), saved)
  with pytest.raises(
    ValueError, match=r"fitted with geometry=qeq.* in the checkpoint and geometry=quad.* here.*arguments"
  ):
    dpo.diagnostics.check_state_layout(dpo.diagnostics.state_layout(saved), here)


def test_a_state_of_another_form_is_refused_and_cannot_be_used():
  tx, other = dpo.dpsgd(0.1), dpo.dpsgd(0.1, dpo.damped_kron(form=dpo.tikhonov.additive))
  with pytest.raises(
    ValueError, match=r"geometry=quad, form=factored in the checkpoint and geometry=quad, form=additive"
  ):
    dpo.diagnostics.check_state_layout(dpo.diagnostics.state_layout(shapes_of(tx)), shapes_of(other))
  with pytest.raises(
    ValueError, match=r"with geometry=quad, form=factored was given to one with .*form=additive.*tx.init"
  ):
    other.update(PARAMS, tx.init(PARAMS), PARAMS, value=1.0, hvp=lambda v: v)


def test_the_meaning_is_a_part_of_the_structure_that_every_library_keeps():
  """No leaf, no type of its own: flax's msgpack, pickle and `optax.tree` have it as they have any dict."""
  tx = dpo.dpsgd(0.1)
  state = tx.init(PARAMS)
  by_flax = flax.serialization.from_bytes(tx.init(PARAMS), flax.serialization.to_bytes(state))
  for again in (by_flax, pickle.loads(pickle.dumps(state)), optax.tree.map_params(tx, lambda x: x, state)):
    assert jax.tree.structure(again) == jax.tree.structure(state)
    dpo.diagnostics.check_state_layout(dpo.diagnostics.state_layout(state), again)


@pytest.mark.parametrize("saved", [None, {}, "0.1.0"])
def test_a_checkpoint_without_layout_is_refused(saved):
  with pytest.raises(ValueError, match=r"needs the layout.*state_layout\(opt_state\).*tx\.init\(params\)"):
    dpo.diagnostics.check_state_layout(saved, shapes_of(dpo.psgd(0.1)))


TRAINING = """
import sys, jax, jax.numpy as jnp, optax, orbax.checkpoint as ocp, dpsgd_optax as dpo
folder, steps = sys.argv[1], int(sys.argv[2])
loss = lambda p: jnp.sum((jnp.tanh(p["w"]) @ p["b"] - 1.0) ** 2)
params = {"b": jnp.array([0.3, -0.2]), "w": jnp.full((3, 2), 0.1)}
tx = dpo.psgd(0.01, dpo.kron(), dpo.newton())

@jax.jit
def train_step(params, state):
  updates, state = tx.update(jax.grad(loss)(params), state, params, hvp=dpo.hvp(loss, params))
  return optax.apply_updates(params, updates), state

now = params, tx.init(params)
with ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(max_to_keep=3)) as manager:
  done = manager.latest_step() or 0
  if done:
    found = manager.restore(done, args=ocp.args.Composite(
      now=ocp.args.StandardRestore(jax.eval_shape(lambda: now)), layout=ocp.args.JsonRestore()))
    dpo.diagnostics.check_state_layout(found.layout, now[1])
    now = found.now
  print("from", done, flush=True)
  for step in range(done + 1, steps + 1):
    now = train_step(*now)
    manager.save(step, args=ocp.args.Composite(
      now=ocp.args.StandardSave(now), layout=ocp.args.JsonSave(dpo.diagnostics.state_layout(now[1]))))
    print("step", step, flush=True)
print("end", [x.tobytes().hex() for x in jax.tree.leaves(jax.device_get((now[0], now[1][0].preconditioner)))])
"""


def training(folder, steps):
  return subprocess.Popen([sys.executable, "-c", TRAINING, str(folder), str(steps)], cwd=ROOT, stdout=-1, text=True)


@pytest.mark.slow
def test_a_run_killed_while_it_saves_goes_on_bit_for_bit(tmp_path):
  """SIGKILL at six moments of a loop that does little else than write checkpoints; then it is let finish."""
  steps, starts = 60, []
  for kill in range(6):
    process = training(tmp_path / "killed", steps)
    starts.append(int(process.stdout.readline().split()[1]))
    for _ in range(5):
      process.stdout.readline()
    time.sleep(0.013 * kill)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
  ends = []
  for folder in ("killed", "whole"):
    output, _ = training(tmp_path / folder, steps).communicate()
    ends.append(output.splitlines()[-1])
  assert ends[0].startswith("end") and ends[0] == ends[1]
  assert 0 < starts[-1] < steps and starts == sorted(starts)


@pytest.mark.slow
def test_a_benchmark_killed_between_seeds_goes_on_to_the_same_curves(tmp_path):
  """`python -m benchmarks --resume` after SIGKILL; the clocks apart, the document is that of a run in one go."""
  command = [sys.executable, "-m", "benchmarks", "digits", "--optimizers", "psgd,sgd(learning_rate=0.1)"]
  command += ["--epochs", "0.5", "--train-size", "400", "--evaluations", "3", "--seeds", "3", "--name", "run", "--out"]
  document = tmp_path / "killed" / "run.json"
  process = subprocess.Popen([*command, str(document.parent)], cwd=ROOT, stdout=subprocess.DEVNULL)
  deadline = time.monotonic() + 300
  while not document.exists() and time.monotonic() < deadline:
    time.sleep(0.005)
  process.send_signal(signal.SIGKILL)
  assert process.wait() == -signal.SIGKILL
  before = len(json.loads(document.read_text())["runs"])
  subprocess.run([*command, str(document.parent), "--resume"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
  subprocess.run([*command, str(tmp_path / "whole")], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)

  def curves(path):
    runs = json.loads(path.read_text())["runs"]
    clocks = ("seconds", "cpu_seconds")
    return {(r["optimizer"], r["seed"]): {k: c for k, c in r["curves"].items() if k not in clocks} for r in runs}

  assert 0 < before < len(curves(document)) == 6
  assert curves(document) == curves(tmp_path / "whole" / "run.json")
