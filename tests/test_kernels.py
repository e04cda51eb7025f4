"""Pallas TPU kernels against their references, in TPU interpret mode, which also finds races and reads out of bounds."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from hire.kernels import groups as grouped

INTERPRET = pltpu.InterpretParams(detect_races=True)


def layer(seed, dtype, batch, neurons=256, width=128):
    rng = np.random.default_rng(seed)
    shapes = (batch, width), (neurons, width), (neurons, width)
    return tuple(jnp.asarray(rng.normal(size=shape) / width**0.25, dtype) for shape in shapes)


def test_the_ffn_reference_by_hand():
    x, up = jnp.asarray([[1.0, 2.0]]), jnp.arange(16.0)[:, None] * jnp.asarray([[1.0, -1.0]])  # neuron i gives -i: silent
    up = up.at[8].set(jnp.asarray([3.0, 1.0])).at[3].set(jnp.asarray([0.0, 2.0]))  # neurons 8 and 3 give 5 and 4
    down = jnp.ones((16, 2)).at[8].set(jnp.asarray([10.0, 0.0]))
    assert grouped.ffn_reference(x, up, down, jnp.asarray([1])).tolist() == [[50.0, 0.0]]
    assert grouped.ffn_reference(x, up, down, jnp.asarray([1, 0])).tolist() == [[54.0, 4.0]]


@settings(max_examples=8)
@given(
    st.sampled_from([jnp.float32, jnp.bfloat16]),
    st.sampled_from([1, 3, 16]),
    st.sampled_from([8, 16]),
    st.sampled_from([1, 5, 16, 17, 40]),
    st.integers(0, 2**31),
)
def test_the_ffn_kernel_is_its_reference(dtype, batch, group, count, seed):
    x, up, down = layer(seed, dtype, batch)
    chosen = jnp.asarray(np.random.default_rng(seed).integers(0, 256 // group, count), jnp.int32)  # unsorted, some repeated
    expected = grouped.ffn_reference(x, up, down, chosen, group=group)
    found = grouped.ffn(x, up, down, chosen, group=group, interpret=INTERPRET)
    assert found.shape == expected.shape and found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=2e-5 * float(jnp.abs(expected).max()) + 1e-6)


def test_a_group_is_whole_tiles():
    x, up, down = layer(0, jnp.float32, 1)
    with pytest.raises(ValueError, match="group = 4: expected a multiple of 8"):
        grouped.ffn(x, up, down, jnp.asarray([0]), group=4)
