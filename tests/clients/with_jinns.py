# SPDX-License-Identifier: Apache-2.0
"""jinns: a physics-informed network for u′ = −u by `jinns.solve`, with and without extra arguments."""

import equinox as eqx
import jax
import jinns
from jinns.solver import GetJinnsVariableName

import dpsgd_optax as dpo

STEPS = 100


class Decay(jinns.loss.ODE):
  def equation(self, t, u, params):
    return jax.jacrev(lambda t: u(t, params))(t).squeeze() + params.eq_params.rate * u(t, params)


def get_value_fn(loss, batch):
  """jinns calls what is named `get_…` with variables of its own step, by their names."""
  return lambda params: loss.evaluate(params, batch)[0]


def get_hvp(loss, params, batch):
  return dpo.hvp(lambda params: loss.evaluate(params, batch)[0], params)


EXTRAS = {"value": GetJinnsVariableName("train_loss_value"), "value_fn": get_value_fn, "hvp": get_hvp}


def solve(optimizer, extras):
  layers = ((eqx.nn.Linear, 1, 12), (jax.nn.tanh,), (eqx.nn.Linear, 12, 1))
  u, network = jinns.nn.PINN_MLP.create(key=jax.random.key(0), eqx_list=layers, eq_type="ODE")
  params = jinns.parameters.Params(nn_params=network, eq_params={"rate": 1.0})
  times = jinns.data.DataGeneratorODE(key=jax.random.key(1), nt=64, tmin=0.0, tmax=1.0, temporal_batch_size=32)
  loss = jinns.loss.LossODE(
    u=u,
    dynamic_loss=Decay(Tmax=1),
    loss_weights=jinns.loss.LossWeightsODE(dyn_loss=1.0, initial_condition=1.0),
    initial_condition=(0.0, 1.0),
    params=params,
  )
  _, losses, *_ = jinns.solve(
    n_iter=STEPS,
    init_params=params,
    data=times,
    loss=loss,
    optimizer=optimizer.make(),
    verbose=False,
    extra_optax_args_and_kwargs=extras,
  )
  return losses


def plain(optimizer):
  return solve(optimizer, None)


def extra_arguments(optimizer):
  return solve(optimizer, {name: EXTRAS[name] for name in optimizer.needs})
