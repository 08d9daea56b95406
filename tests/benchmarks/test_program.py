# SPDX-License-Identifier: Apache-2.0
"""Kernels of a program, counted in its text."""

import jax
import jax.numpy as jnp
import optax

from benchmarks.engine.program import kernels

TEXT = """HloModule jit_step, is_scheduled=true

%fused_computation.5 (p: f32[8,8], q: f32[8,8]) -> f32[8,8] {
  %p = f32[8,8]{1,0} parameter(0)
  %q = f32[8,8]{1,0} parameter(1)
  ROOT %dot.1 = f32[8,8]{1,0} dot(%p, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%branch (a: (f32[8,8], s32[])) -> (f32[8,8], s32[]) {
  %a = (f32[8,8]{1,0}, s32[]) parameter(0)
  %x = f32[8,8]{1,0} get-tuple-element(%a), index=0
  %copy.7 = f32[8,8]{0,1} copy(%x)
  ROOT %t = (f32[8,8]{1,0}, s32[]) custom-call(%copy.7), custom_call_target="of fusion(dot("
}

ENTRY %main.9 (x: f32[8,8], y: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0)
  %y = f32[8,8]{1,0} parameter(1)
  %dot_fusion = f32[8,8]{1,0} fusion(%x, %y), kind=kCustom, calls=%fused_computation.5, metadata={op_name="a copy(b)"}
  %dot.3 = f32[8,8]{1,0} dot(%dot_fusion, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %pair = (f32[8,8]{1,0}, /*index=1*/(s32[], f32[8,8]{1,0})) call(%dot.3), to_apply=%branch
  %z = f32[8,8]{1,0} get-tuple-element(%pair), index=0
  ROOT %add.1 = f32[8,8]{1,0} add(%z, %copy.7), metadata={op_name="jit(step)/ dot(x)"}
}
"""


def test_each_launch_counts_once_and_what_a_fusion_holds_does_not():
  assert kernels(TEXT) == {"copy": 1, "custom-call": 1, "fusion": 1, "dot": 1, "call": 1}


def test_what_fuses_is_one_kernel_and_both_branches_count():
  text = lambda f, *x: jax.jit(f).lower(*x).compile().as_text()
  x = jnp.ones(64)
  assert kernels(text(lambda x: jnp.sin(x) + 2 * jnp.cos(x), x)) == {"fusion": 1}
  assert kernels(text(lambda x: x, x)).total() <= 1  # a copy at most
  branches = lambda c, x: jax.lax.cond(c, lambda x: jnp.sin(x) * x, lambda x: jnp.exp(x) * x, x)
  assert kernels(text(branches, True, x))["fusion"] >= 2


def test_adam_costs_a_few_kernels_for_each_leaf():
  params = {name: jnp.ones((9, 9)) for name in "abcd"}
  tx = optax.adam(0.1)
  found = kernels(jax.jit(tx.update).lower(params, tx.init(params)).compile().as_text()).total()
  assert 4 <= found <= 30
