# SPDX-License-Identifier: Apache-2.0
"""Wrong use is a ValueError that names the argument, says what came, and what to type."""

import jax.numpy as jnp
import optax
import pytest

import dpsgd_optax as dpo

P = jnp.ones(2)
LAYER = {"one": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}
ROWS = jnp.ones((4, 3))
SHAPES = {"one": {"kernel": dpo.LayerRecord((ROWS,), kernel_shape=(3, 2), bias=("one", "bias"))}}


def loss(p):
  return jnp.sum(p**2)


def update(tx, params=P, **extra):
  return tx.update(P, tx.init(P), params, **extra)


def layered(make, params=LAYER, inputs=None, **options):
  """One step of `bnp` or `gls`."""
  tx = make(0.1, **options)
  return tx.update(params, tx.init(params), params, layer_inputs=inputs)


CALLS = {
  "soap basis_every": (lambda: dpo.soap(basis_every=0), "basis_every", "at least 1", "basis_every=10"),
  "soap basis_every, a float": (lambda: dpo.soap(basis_every=10.0), "basis_every", "an int", "basis_every=10"),
  "soap b2": (lambda: dpo.soap(b2=1.0), "b2", "[0, 1)", "1.0", "Try"),
  "soap b2, negative": (lambda: dpo.soap(b2=-0.1), "b2", "[0, 1)", "-0.1"),
  "soap eps": (lambda: dpo.soap(eps=-1e-8), "eps", "not negative", "-1e-08", "Try 1e-8"),
  "soap max_size": (lambda: dpo.soap(max_size=0), "max_size", "positive", "max_size=1"),
  "soap max_skew": (lambda: dpo.soap(max_skew=-1.0), "max_skew", "not negative", "-1.0"),
  "soap moment_dtype": (
    lambda: dpo.soap(moment_dtype=jnp.int8),
    "moment_dtype",
    "real floating",
    "int8",
    "jnp.bfloat16",
  ),
  "gls learning rate": (lambda: dpo.gls(-0.1), "learning_rate", "-0.1"),
  "gls damping": (lambda: dpo.gls(0.1, damping=-0.1), "damping", "not negative", "-0.1"),
  "gls decay": (lambda: dpo.gls(0.1, decay=1.0), "decay", "[0, 1)", "1.0"),
  "gls max_size": (lambda: dpo.gls(0.1, max_size=0), "max_size", "positive", "jnp.inf"),
  "bnp decay": (lambda: dpo.bnp(0.1, decay=-0.5), "decay", "[0, 1)", "-0.5"),
  "bnp damping": (lambda: dpo.bnp(0.1, damping=-1.0), "damping", "not negative", "-1.0"),
  "bnp relative damping": (lambda: dpo.bnp(0.1, relative_damping=-1.0), "relative_damping", "-1.0"),
  "bnp without layer_inputs": (lambda: layered(dpo.bnp), "`layer_inputs`", "with_layer_inputs", "layer_inputs=inputs"),
  "gls without layer_inputs": (lambda: layered(dpo.gls), "`layer_inputs`", "with_layer_inputs", "layer_inputs=inputs"),
  "clip without layer_inputs": (
    lambda: dpo.layers.clip_output_change().update(LAYER, (), LAYER),
    "`clip_output_change`",
    "`layer_inputs`",
  ),
  "a layer without inputs": (
    lambda: layered(dpo.gls, {**LAYER, "two": LAYER["one"]}, {"one": ROWS}),
    "two/kernel",
    "variable_axes",
    "fallback=",
  ),
  "inputs of no layer": (lambda: layered(dpo.bnp, inputs={"one": ROWS, "three": ROWS}), "'three'", "one/kernel"),
  "layers of no layer": (
    lambda: layered(dpo.gls, {"two": LAYER["one"]}, SHAPES, layers=SHAPES),
    "`layers`",
    "'one/kernel'",
    "two/kernel",
  ),
  "layers that are no records": (lambda: layered(dpo.gls, layers={"one": ROWS}), "`layers`", "jax.eval_shape"),
  "inputs of the wrong width": (
    lambda: layered(dpo.gls, inputs={"one": jnp.ones((4, 5))}),
    "'one/kernel'",
    "(…, 3)",
    "(4, 5)",
  ),
  "a leaf of no layer": (
    lambda: layered(dpo.gls, {**LAYER, "norm": {"scale": P}}, {"one": ROWS}),
    "norm/scale",
    "fallback=optax.adam(1e-3)",
  ),
  "a matrix of no layer": (
    lambda: layered(dpo.bnp, {**LAYER, "other": jnp.ones((2, 2))}, {"one": ROWS}),
    "other",
    "fallback=",
    "jax.eval_shape",
  ),
  "a stack of layers by shape alone": (
    lambda: layered(
      dpo.gls,
      {"one": {"kernel": jnp.ones((5, 3, 2))}},
      {"one": {"kernel": dpo.LayerRecord((jnp.ones((5, 4, 3)),), kernel_shape=(3, 2))}},
    ),
    "'one/kernel'",
    "stacked",
    "jax.eval_shape",
  ),
  "psgd learning rate": (lambda: dpo.psgd(-0.1), "learning_rate", "-0.1", "descends"),
  "dpsgd learning rate": (lambda: dpo.dpsgd(-1), "learning_rate", "-1"),
  "clipped learning rate": (lambda: dpo.clipped_learning_rate(-0.1), "learning_rate", "-0.1"),
  "clip": (lambda: dpo.clipped_learning_rate(0.1, -1.0), "max_norm", "-1.0", "jnp.inf"),
  "dpsgd clip": (lambda: dpo.dpsgd(0.1, max_update_norm=-1.0), "norm", "-1.0"),
  "kron step 0": (lambda: dpo.kron(step_size=0), "step_size", "(0, 1]", "got 0"),
  "kron step 1.5": (lambda: dpo.kron(step_size=1.5), "step_size", "(0, 1]", "1.5"),
  "diagonal step": (lambda: dpo.diagonal(step_size=0.0), "step_size", "(0, 1]"),
  "damped_kron step": (lambda: dpo.damped_kron(step_size=-0.1), "step_size", "(0, 1]"),
  "dpsgd step": (lambda: dpo.dpsgd(0.1, dpo.damped_kron(step_size=1.5)), "step_size", "(0, 1]", "1.5"),
  "average 1": (lambda: dpo.damped_kron(average=1.0), "average", "[0, 1)", "1.0", "None"),
  "average negative": (lambda: dpo.damped_kron(average=-0.1), "average", "[0, 1)", "-0.1"),
  "two_tap": (lambda: dpo.tikhonov.two_tap(-0.7, 0.3), "new", "-0.7"),
  "b1": (lambda: dpo.psgd(0.1, b1=1), "b1", "[0, 1)", "got 1"),
  "weight decay": (lambda: dpo.psgd(0.1, weight_decay=-1e-4), "weight_decay", "-0.0001"),
  "psgd every": (lambda: dpo.psgd(0.1, every=0), "every", "at least 1", "got 0"),
  "dpsgd every": (lambda: dpo.dpsgd(0.1, every=0), "every", "at least 1"),
  "every as float": (lambda: dpo.dpsgd(0.1, every=2.5), "every", "int", "2.5", "every=2"),
  "judge_every": (lambda: dpo.dpsgd(0.1, judge_every=0), "judge_every", "at least 1"),
  "marquardt every": (lambda: dpo.levenberg_marquardt(optax.sgd(0.1), every=0), "every", "at least 1"),
  "psgd damping": (lambda: dpo.psgd(0.1, damping=-1e-9), "damping", "not negative", "-1e-09"),
  "dpsgd damping": (lambda: dpo.dpsgd(0.1, damping=-1.0), "damping", "not negative", "-1.0"),
  "marquardt damping": (lambda: dpo.levenberg_marquardt(optax.sgd(0.1), damping=-1.0), "damping", "not negative"),
  "eta": (lambda: dpo.damped_kron(eta=-1e-5), "eta", "not negative", "-1e-05"),
  "bounds of the damping": (lambda: dpo.dpsgd(0.1, bounds=(1e-5, 1e-7)), "low", "high", "1e-07"),
  "factor": (lambda: dpo.levenberg_marquardt(optax.sgd(0.1), factor=0.0), "factor", "positive", "19/20"),
  "thresholds": (
    lambda: dpo.levenberg_marquardt(optax.sgd(0.1), thresholds=(0.75, 0.25)),
    "thresholds",
    "(0.75, 0.25)",
    "(0.25, 0.75)",
  ),
  "bounds": (lambda: dpo.levenberg_marquardt(optax.sgd(0.1), bounds=(1.0, 0.1)), "bounds", "(1.0, 0.1)", "low"),
  "repeats": (lambda: dpo.damped_kron(repeats=0), "repeats", "at least 1", "got 0"),
  "max_size": (lambda: dpo.kron(max_size=0), "max_size", "positive"),
  "damped max_size": (lambda: dpo.damped_kron(max_size=0), "max_size", "positive"),
  "max_vector_size": (lambda: dpo.damped_kron(max_vector_size=-1), "max_vector_size", "None"),
  "max_skew": (lambda: dpo.kron(max_skew=-1.0), "max_skew", "-1.0"),
  "kron init_scale": (lambda: dpo.kron(init_scale=0.0), "init_scale", "positive", "None"),
  "diagonal init_scale": (lambda: dpo.diagonal(init_scale=-1.0), "init_scale", "positive"),
  "probability": (lambda: dpo.annealed_probability(peak=1.5), "peak", "[0, 1]", "1.5"),
  "stacked": (
    lambda: dpo.kron(stacked={"w": 3}).init({"w": jnp.ones((2, 3))}),
    "stacked",
    "3 leading axes",
    "['w']",
    "(2, 3)",
  ),
  "integer leaf": (lambda: dpo.dpsgd(0.1).init({"a": jnp.arange(2)}), "['a']", "int32", "optax.masked"),
  "newton without hvp": (lambda: update(dpo.psgd(0.1, dpo.diagonal(), dpo.newton())), "`hvp`", "hvp=hvp(loss, params)"),
  "newton without params": (
    lambda: update(dpo.psgd(0.1, dpo.diagonal(), dpo.newton()), params=None, value_fn=loss),
    "`params`",
    "None",
  ),
  "no value": (lambda: update(dpo.levenberg_marquardt(optax.sgd(0.1))), "`value`", "`value_fn`", "value=loss_value"),
  "dpsgd without value": (lambda: update(dpo.dpsgd(0.1), hvp=lambda v: v), "`value`", "`value_fn`"),
  "dpsgd without hvp": (lambda: update(dpo.dpsgd(0.1), value=1.0), "`hvp`", "hvp=hvp(loss, params)"),
  "value_fn without params": (
    lambda: update(dpo.levenberg_marquardt(optax.sgd(0.1)), params=None, value_fn=loss),
    "`value_fn`",
    "`params`",
    "None",
  ),
  "newton_model without rate": (
    lambda: update(dpo.levenberg_marquardt(optax.sgd(0.1), model=dpo.newton_model), value_fn=loss),
    "`newton_model`",
    "clipped_learning_rate",
    "model=half_slope",
  ),
  "quadratic_model without hvp": (
    lambda: update(dpo.levenberg_marquardt(optax.sgd(0.1), model=dpo.quadratic_model), value=1.0),
    "`quadratic_model`",
    "hvp=hvp(loss, params)",
  ),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_message_names_the_argument_what_came_and_what_to_type(name):
  call, *words = CALLS[name]
  with pytest.raises(ValueError) as error:
    call()
  message = str(error.value)
  missing = [word for word in words if word not in message]
  assert not missing, f"{missing} not in: {message}"


@pytest.mark.parametrize(
  "call",
  [
    lambda: dpo.psgd(
      optax.constant_schedule(0.1), damping=optax.constant_schedule(0.1), every=dpo.annealed_probability()
    ),
    lambda: dpo.dpsgd(0.0, dpo.damped_kron(average=None), damping=None, every=3, max_update_norm=jnp.inf),
    lambda: dpo.dpsgd(0.1, dpo.damped_kron(average=0.0, step_size=1.0, eta=0.0, max_vector_size=0), damping=0.0),
    lambda: dpo.kron(max_size=jnp.inf, max_skew=0, step_size=1),
    lambda: dpo.levenberg_marquardt(optax.sgd(0.1), factor=2.0, thresholds=(0.5, 0.5), bounds=(1.0, 1.0)),
  ],
)
def test_the_ends_of_the_ranges_and_schedules_are_accepted(call):
  call()
