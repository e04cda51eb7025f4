"""Top-k in one and two stages, and recall, against hand-worked numbers and against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hire
from hire.ops.sortable import kth_largest_int, top_k_packed
from hire.ops.top_k import expected_recall, expected_recall_top1, floor_fraction


def test_a_limit_is_never_exceeded():
    assert [floor_fraction(share, 256) for share in (0.1, 0.05, 0.25, 1.0)] == [25, 12, 64, 256]
    assert (
        floor_fraction(0.3, 10) == 3 and floor_fraction(0.29, 100) == 29
    )  # 0.29 * 100 is a little less than 29 in floating point
    assert floor_fraction(0.1**0.5 * 0.1**0.5, 10) == 1


def test_exact_top_k_by_hand():
    scores = jnp.asarray([[3.0, 9.0, 1.0, 9.0, -2.0]])
    top = hire.exact_top_k(scores, 3)
    assert top.values.tolist() == [[9.0, 9.0, 3.0]]
    assert top.indices.tolist() == [[1, 3, 0]]  # of equal scores the lower index first


def test_bfloat16_scores_come_back_in_float32():
    top = hire.exact_top_k(jnp.asarray([1.0, 2.0], jnp.bfloat16), 1)
    assert top.values.dtype == jnp.float32 and top.indices.tolist() == [1]


def test_bucketed_by_hand():
    # Buckets of i mod 3: {9, 1, 8}, {2, 7}, {5, 6}. Best of each: 9, 7, 6; the 8 shares a bucket
    # with the 9.
    scores = jnp.asarray([9.0, 2.0, 5.0, 1.0, 7.0, 6.0, 8.0])
    top = hire.bucketed_top_k(scores, 3, buckets=3)
    assert top.values.tolist() == [9.0, 7.0, 6.0] and top.indices.tolist() == [0, 4, 5]
    assert hire.bucketed_top_k(scores, 3, buckets=3, per_bucket=2).indices.tolist() == [0, 6, 4]


@given(
    st.sampled_from([1, 3]),
    st.sampled_from([1, 13, 70]),
    st.sampled_from([1, 5, 13, 32]),
    st.integers(1, 4),
    st.integers(0, 2**31),
    st.booleans(),
)
def test_bucketed_against_numpy(batch, rows, buckets, per_bucket, seed, masked):
    buckets = min(buckets, rows)
    per_bucket = min(per_bucket, -(-rows // buckets))
    rng = np.random.default_rng(seed)
    scores = rng.permuted(np.tile(np.arange(rows, dtype=np.float32), (batch, 1)), axis=1)
    if masked:
        scores[:, rng.random(rows) < 0.5] = -np.inf
    kept = sum(min(per_bucket, len(range(bucket, rows, buckets))) for bucket in range(buckets))
    k = int(rng.integers(1, kept + 1))
    top = hire.bucketed_top_k(jnp.asarray(scores), k, buckets=buckets, per_bucket=per_bucket)
    for row, values, indices in zip(
        scores, np.asarray(top.values), np.asarray(top.indices), strict=True
    ):
        survivors = np.concatenate(
            [np.sort(row[bucket::buckets])[::-1][:per_bucket] for bucket in range(buckets)]
        )
        assert values.tolist() == np.sort(survivors)[::-1][:k].tolist()
        assert row[indices].tolist() == values.tolist()
        assert len(set(indices.tolist())) == k


def test_recall_by_hand():
    scores = jnp.asarray([[5.0, 4.0, 3.0, 2.0, 1.0]])
    assert hire.recall(jnp.asarray([[0, 1, 4]]), scores, 3).tolist() == pytest.approx([2 / 3])
    assert hire.recall(jnp.asarray([[0, 0, 0]]), scores, 3).tolist() == pytest.approx(
        [1 / 3]
    )  # once, not three times


def test_recall_takes_any_of_equal_scores_but_no_more_than_the_top_k_holds():
    scores = jnp.asarray([5.0, 4.0, 4.0, 4.0])
    assert float(hire.recall(jnp.asarray([0, 3]), scores, 2)) == 1.0
    assert (
        float(hire.recall(jnp.asarray([1, 2, 3]), scores, 2)) == 0.5
    )  # three ties do not make up for the 5


def test_expected_recall_by_hand():
    # Four rows in two buckets of two: the second best shares the best one's bucket in 1 of 3 cases,
    # and is lost.
    assert expected_recall(4, 2, buckets=2) == pytest.approx(1 - 1 / 6)
    assert expected_recall(4, 2, buckets=2, per_bucket=2) == 1.0
    assert expected_recall_top1(2, buckets=2) == 0.5


@pytest.mark.parametrize("per_bucket", [1, 2])
def test_measured_recall_is_what_the_formula_expects(rng, per_bucket):
    scores = jnp.asarray(rng.normal(size=(400, 1024)), jnp.float32)
    top = hire.bucketed_top_k(scores, 32, buckets=64, per_bucket=per_bucket)
    measured = np.asarray(hire.recall(top.indices, scores, 32))
    error = 4 * measured.std() / np.sqrt(len(measured))
    assert measured.mean() == pytest.approx(
        expected_recall(1024, 32, buckets=64, per_bucket=per_bucket), abs=error
    )


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda s: hire.exact_top_k(s, 0), "k = 0: expected a whole number from 1 to 8"),
        (lambda s: hire.exact_top_k(s, 9), "k = 9: expected a whole number from 1 to 8"),
        (
            lambda s: hire.bucketed_top_k(s, 3, buckets=2),
            "k = 3: .* from 1 to 2 .what 2 buckets keep",
        ),
        (lambda s: hire.bucketed_top_k(s, 1, buckets=9), "buckets = 9"),
        (lambda s: hire.bucketed_top_k(s, 1, buckets=4, per_bucket=3), "per_bucket = 3"),
        (lambda s: hire.recall(jnp.asarray([0]), s, 9), "k = 9"),
        (
            lambda s: expected_recall(8, 1, buckets=3),
            "buckets = 3: expected a divisor of the 8 rows",
        ),
    ],
)
def test_bad_counts_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.arange(8.0))


def test_the_compiler_shards_a_top_k_and_sorts_no_rows(rng):
    scores = rng.normal(size=(2, 4096)).astype(np.float32)
    mesh = jax.make_mesh((4,), ("chips",), (jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(scores, jax.NamedSharding(mesh, jax.P(None, "chips")))
    best = np.argsort(-scores, axis=1)[:, :5]
    assert (
        np.asarray(jax.jit(hire.exact_top_k, static_argnames="k")(sharded, k=5).indices) == best
    ).all()
    second = jax.jit(
        lambda scores: hire.exact_top_k(scores, 5).values[:, 1]
    )  # of which it needs little
    program = second.lower(scores).compile().as_text()
    assert "TopK" in program and " sort(" not in program
    assert second(scores).tolist() == np.sort(scores, axis=1)[:, -2].tolist()


@given(
    st.lists(st.integers(-3, 3) | st.sampled_from([-(2**31), 2**31 - 1]), min_size=1, max_size=60),
    st.data(),
)
def test_a_set_of_the_best_is_that_of_a_sort_and_ties_fill_it_from_below(keys, data):
    k = data.draw(st.integers(1, len(keys)))
    order = np.argsort(-np.asarray(keys, np.int64), kind="stable")[:k]
    assert kth_largest_int(jnp.asarray([keys]), k).tolist() == [[keys[order[-1]]]]
    result, indices = top_k_packed(jnp.asarray([keys]), k)
    assert indices.tolist() == [sorted(order.tolist())]  # rising, on a CPU
    assert result.tolist() == [[keys[index] for index in sorted(order)]]
