"""Corrections of estimated sums of exponentials, against hand-worked numbers."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from hire.ops.normalizer import logsumexp_correction, take_ranks


def test_the_correction_by_hand():
    exact = jnp.log(jnp.array([[2.0, 6.0], [3.0, 1.0]]))
    guessed = jnp.log(jnp.array([[1.0, 3.0], [1.0, 1.0]]))
    correction, error = logsumexp_correction(exact, guessed)
    np.testing.assert_allclose(correction, [math.log(2), math.log(2)], rtol=1e-6)
    # Ratios 3 and 1 with weights of a half: relative errors of 1/2 and -1/2.
    np.testing.assert_allclose(error, [0.0, math.sqrt(2 * 0.25**2)], rtol=1e-6, atol=1e-7)


def test_padding_counts_for_nothing():
    exact = jnp.array([[1.0, 0.5, -jnp.inf], [-jnp.inf] * 3])
    guessed = jnp.array([[0.5, 0.0, -jnp.inf], [-jnp.inf] * 3])
    correction, error = logsumexp_correction(exact, guessed)
    np.testing.assert_allclose(correction, [0.5, 0.0], rtol=1e-6)
    np.testing.assert_allclose(error, 0.0, atol=1e-6)
    slope = jax.grad(lambda exact: logsumexp_correction(exact, guessed)[0].sum())(exact)
    assert np.isfinite(slope).all() and slope[1].tolist() == [0.0] * 3


def test_ranks_are_those_of_the_estimated_scores():
    exact, guessed = jnp.array([[1.0, 2.0, 3.0, 4.0]]), jnp.array([[7.0, 9.0, 6.0, 8.0]])
    assert [part.tolist() for part in take_ranks(exact, guessed, 1, 3)] == [
        [[4.0, 1.0]],
        [[8.0, 7.0]],
    ]
