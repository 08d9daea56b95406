# SPDX-License-Identifier: Apache-2.0
"""The networks of the problems, against their equations."""

import jax
import numpy as np

from benchmarks.problems.models import LSTM, Transformer


def test_a_token_sees_none_that_follow():
  """Causality of the transformer and of the LSTM: logits up to t do not move when tokens after t do."""
  tokens = np.arange(12).reshape(2, 6)
  model = Transformer(vocabulary=12, layers=2, width=8, heads=2)
  params = jax.tree.map(lambda x: 10 * x, model.init(jax.random.key(0), tokens))
  changed = np.where(np.arange(6) < 4, tokens, 0)
  first, second = (model.apply(params, x) for x in (tokens, changed))
  assert np.allclose(first[:, :4], second[:, :4]) and not np.allclose(first[:, 4:], second[:, 4:])


def test_lstm_is_its_equations_step_by_step():
  sigmoid = lambda a: 1 / (1 + np.exp(-a))
  x = np.cos(np.arange(12, dtype=np.float32)).reshape(1, 4, 3)
  model = LSTM(hidden=2)
  params = model.init(jax.random.key(0), x)
  p = jax.tree.map(np.asarray, params["params"])
  h, c = np.zeros(2), np.zeros(2)
  for t in range(4):
    i, f, g, o = np.split(x[0, t] @ p["Affine_0"]["kernel"] + p["Affine_0"]["bias"] + h @ p["recurrent"], 4)
    c = sigmoid(f + 1) * c + sigmoid(i) * np.tanh(g)
    h = sigmoid(o) * np.tanh(c)
  assert np.allclose(model.apply(params, x)[0, -1], h, atol=1e-6)
