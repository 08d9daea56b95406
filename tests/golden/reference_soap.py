# SPDX-License-Identifier: Apache-2.0
"""SOAP of one matrix in numpy, from the equations of arXiv:2409.11321, loops over entries and explicit matrices.

It shares no line with the library: P is a matrix on the raveled parameter, U diag(1/(√V̂ + ε)) Uᵀ with U = Q_L ⊗ Q_R.
"""

import numpy as np


def coupled(v, turns=2):
  """λ_L, λ_R of the Kronecker product nearest to diag(V) in the Kullback–Leibler divergence, each of mean one."""
  m, n = v.shape
  left, right = np.ones(m), np.ones(n)
  one = lambda x: (x + 1e-6 * x.mean()) / (x + 1e-6 * x.mean()).mean() if x.any() else np.ones_like(x)
  for _ in range(turns):
    left = one(np.array([sum(v[i, j] / right[j] for j in range(n)) / n for i in range(m)]))
    right = one(np.array([sum(v[i, j] / left[i] for i in range(m)) / m for j in range(n)]))
  return left, right


def soap(observed, *, b2, basis_every, eps, sides=(True, True), kl=False, factored=False, shift=0.0):
  """P after each of the matrices (m, n) in ``observed``; ``sides``: which have a basis; ``shift`` is added to |G'|²."""
  m, n = observed[0].shape
  left, right, v = np.zeros((m, m)), np.zeros((n, n)), np.zeros((m, n))
  ql, qr = np.eye(m), np.eye(n)
  found = []
  for t, g in enumerate(observed):
    if t > 0 and t % basis_every == 0:
      for side, (q, s) in enumerate(((ql, left), (qr, right))):
        if sides[side]:
          order = np.argsort([-(q[:, i] @ s @ q[:, i]) for i in range(len(s))])
          new = np.linalg.qr(s @ q[:, order])[0]
          v = v[order] if side == 0 else v[:, order]
          ql, qr = (new, qr) if side == 0 else (ql, new)
    wl, wr = coupled(v) if kl else (np.ones(m), np.ones(n))
    left = b2 * left + (1 - b2) * g @ qr @ np.diag(1 / wr) @ qr.T @ g.T
    right = b2 * right + (1 - b2) * g.T @ ql @ np.diag(1 / wl) @ ql.T @ g
    if t == 0:
      ql, qr = (
        np.linalg.eigh(s)[1][:, ::-1] if has else np.eye(len(s)) for s, has in zip((left, right), sides, strict=True)
      )
    v = b2 * v + (1 - b2) * ((ql.T @ g @ qr) ** 2 + shift)
    if factored:
      v = np.outer(v.mean(1), v.mean(0)) / v.mean()
    u = np.kron(ql, qr)
    found.append(u @ np.diag(1 / (np.sqrt(v.reshape(-1) / (1 - b2 ** (t + 1))) + eps)) @ u.T)
  return found
