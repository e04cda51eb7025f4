"""Proofs about heads with a bias, a soft cap, masks, logit biases and penalties: never wrong
against float64, and often granted.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hire
from hire.certify import top_upper_bounds
from hire.layers import logit_bounds
from hire.layers.logit_adjustments import LogitAdjustments
from hire.layers.logit_bounds import AdjustedLogits

AS_SHIPPED = dict(
    xla_backend_optimization_level=3, xla_cpu_use_fusion_emitters=True
)  # a proof is about how sums are rounded

SEEDS = st.integers(0, 2**31)


def prove(softmax, x, dense_fallback=False, **changes):
    """The result, of a program that is compiled as users compile it."""
    call = jax.jit(
        lambda softmax, x, changes: softmax.certified(x, dense_fallback=dense_fallback, **changes),
        compiler_options=AS_SHIPPED,
    )
    return call(softmax, x, changes)


def wide(array) -> np.ndarray:
    return np.asarray(array, np.float64)


def exact_logits(softmax, x, mask=None, logit_bias=None, penalties=None) -> np.ndarray:
    """The logits of all tokens after all adjustments, in float64."""
    logits = wide(x) @ wide(softmax.rows).T
    if softmax.bias is not None:
        logits = logits + wide(softmax.bias)
    if softmax.soft_cap:
        cap = float(np.float32(softmax.soft_cap))
        logits = cap * np.tanh(logits / cap)
    if penalties is not None:
        settings_ = penalties.repetition, penalties.presence, penalties.frequency
        numbers = [np.broadcast_to(wide(np.float32(part)), len(x)) for part in settings_]
        for query, tokens in enumerate(np.asarray(penalties.tokens)):
            repetition, presence, frequency = (part[query] for part in numbers)
            for token in set(tokens.tolist()):
                if 0 <= token < logits.shape[1]:
                    logit = logits[query, token]
                    logit = logit / repetition if logit > 0 else logit * repetition
                    count = (tokens == token).sum()
                    logits[query, token] = logit - presence - frequency * count
    if logit_bias is not None:
        logits = logits + wide(logit_bias)
    return logits if mask is None else np.where(mask, logits, -np.inf)


def wrong(result, exact, softmax, x) -> np.ndarray:
    """Whether the proof of each query is wrong: its set, or a value beyond its rounding."""
    tokens, values = np.asarray(result.top.indices), wide(result.top.values)
    k, is_there = tokens.shape[1], np.zeros(exact.shape, bool)
    true_values = np.take_along_axis(exact, tokens, axis=1)
    num_allowed = np.minimum((exact > -np.inf).sum(1), k)
    is_wrong = (values > -np.inf).sum(1) != num_allowed
    is_wrong |= (true_values > -np.inf).sum(1) != num_allowed
    for query, row in enumerate(tokens):
        is_there[query, row] = True
        is_wrong[query] |= len(set(row.tolist())) != k
    best_missing = np.where(is_there, -np.inf, exact).max(1)
    worst_returned = np.where(true_values > -np.inf, true_values, np.inf).min(1)
    size = np.linalg.norm(wide(x), axis=1) * np.linalg.norm(wide(softmax.rows), axis=1).max()
    is_wrong |= worst_returned < best_missing - 1e-14 * size
    # Sums of products, and five roundings of numbers below 60.
    accuracy = 2.0**-24 * (math.ceil(math.log2(x.shape[1])) + 8) * size + 2.0**-18 * 60
    with np.errstate(invalid="ignore"):
        is_off = np.abs(values - true_values) > accuracy[:, None]
    is_wrong |= (is_off & (true_values > -np.inf)).any(1)
    return is_wrong & np.asarray(result.proved)


def drawn_head(rng, trap: str, m: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and queries: easy ones, or rows that differ by the error of an estimator or less."""
    rows, x = rng.normal(size=(m, d)), rng.normal(size=(12, d))
    if trap == "near":
        rows = rng.normal(size=(1, d)) + rows * 10.0 ** rng.uniform(-8, -1, (m, 1))
    if trap == "duplicates":
        rows = rows[rng.integers(0, m // 4, m)]
    if trap == "easy":
        rows *= np.geomspace(1, 30, m)[:, None]
    return rows.astype(np.float32), x.astype(np.float32)


@settings(max_examples=12)
@given(
    shape=st.sampled_from([(90, 24), (64, 5)]),
    trap=st.sampled_from(["easy", "near", "duplicates", "tied"]),
    kind=st.sampled_from([8, 8, "rank"]),
    k_and_candidates=st.sampled_from([(1, 1), (4, 16), (5, 64)]),
    has_bias=st.booleans(),
    soft_cap=st.sampled_from([0.0, 0.5, 30.0]),
    allowed=st.sampled_from([None, 2, 40]),
    has_logit_bias=st.booleans(),
    repetition=st.sampled_from([None, 1.3, 0.5]),
    seed=SEEDS,
)
def test_a_proof_is_never_wrong(
    shape, trap, kind, k_and_candidates, has_bias, soft_cap, allowed, has_logit_bias, repetition,
    seed,
):  # fmt: skip
    (m, d), (k, candidates), rng = shape, k_and_candidates, np.random.default_rng(seed)
    rows, x = drawn_head(rng, trap, m, d)
    bias = rng.normal(size=m).astype(np.float32)
    logit_bias = rng.normal(size=m).astype(np.float32)
    if trap == "tied":  # the bias makes the logits of the first query equal, up to a rounding
        noise = rng.choice([0, 1e-7, 1e-6, 1e-4], m) * rng.normal(size=m)
        bias = (3 - wide(x)[0] @ wide(rows).T + noise).astype(np.float32)
        logit_bias = (noise[::-1]).astype(np.float32)
        x[1:] = x[0]
    estimator = hire.LowRank.fit(rows, d, bits=8) if kind == "rank" else hire.Quantized.fit(rows, 8)
    softmax = hire.HireSoftmax(
        jnp.asarray(rows),
        estimator,
        k=k,
        candidates=candidates,
        bias=jnp.asarray(bias) if has_bias else None,
        soft_cap=soft_cap,
    )
    changes = {}
    if allowed is not None:
        mask = np.stack([rng.permutation(m) < allowed for _ in x])
        changes["mask"] = jnp.asarray(mask if seed % 2 else mask[0])
    if has_logit_bias:
        logit_bias[rng.random(m) < 0.1] = -np.inf
        changes["logit_bias"] = jnp.asarray(logit_bias)
    if repetition is not None:
        tokens = jnp.asarray(rng.integers(-1, m + 1, (len(x), 9)), jnp.int32)
        presence = jnp.asarray(rng.normal(size=len(x)), jnp.float32)
        changes["penalties"] = hire.Penalties(tokens, repetition, presence, 0.25)
    exact = exact_logits(softmax, x, **changes)
    result = prove(softmax, x, dense_fallback=True, **changes)
    assert not wrong(result, exact, softmax, x).any()
    order = -np.sort(-exact, axis=1)[:, :k]
    size = np.linalg.norm(wide(x), axis=1) * np.linalg.norm(wide(rows), axis=1).max()
    accuracy = 2.0**-20 * (size[:, None] + 60)
    is_allowed = order > -np.inf
    values = wide(result.top.values)
    np.testing.assert_array_equal(values > -np.inf, is_allowed)
    off = np.subtract(values, order, where=is_allowed, out=np.zeros_like(order))
    assert (np.abs(off) <= accuracy).all()


@pytest.mark.parametrize(
    "head, names",
    [
        (dict(bias=True), ()),
        (dict(soft_cap=30.0), ()),
        (dict(bias=True, soft_cap=30.0), ("mask", "logit_bias", "penalties")),
        ({}, ("mask", "penalties")),
    ],
)
def test_most_are_granted_where_logits_lie_apart(rng, head, names):
    m, d = 2000, 32
    rows = (rng.normal(size=(m, d)) * rng.uniform(0.1, 2, (m, 1))).astype(np.float32)
    x = rng.normal(size=(40, d)).astype(np.float32)
    bias = jnp.asarray(rng.normal(size=m), jnp.float32) if "bias" in head else None
    softmax = hire.HireSoftmax(
        jnp.asarray(rows), hire.Quantized.fit(rows, 8), k=4, candidates=64,
        bias=bias, soft_cap=head.get("soft_cap", 0.0),
    )  # fmt: skip
    tokens = np.argsort(-(x @ rows.T), axis=1)[:, :6].astype(np.int32)
    every = dict(
        mask=jnp.asarray(rng.random((40, m)) < 0.3),
        logit_bias=jnp.asarray(rng.normal(size=m), jnp.float32),
        penalties=hire.Penalties(jnp.asarray(tokens), 1.5, 0.5, 0.1),
    )
    changes = {name: every[name] for name in names}
    result = prove(softmax, x, **changes)
    exact = exact_logits(softmax, x, **changes)
    assert not wrong(result, exact, softmax, x).any()
    assert result.proved.mean() > 0.8
    assert all(
        set(row.tolist()) == set(best.tolist())
        for row, best, proved in zip(
            np.asarray(result.top.indices),
            np.argsort(-exact, axis=1)[:, :4],
            np.asarray(result.proved),
            strict=True,
        )
        if proved
    )


def test_by_hand():
    # Scores 4, 3, 1, 0 and biases: logits 4, 3.5, 5, 0.
    rows = jnp.asarray([[4.0], [3.0], [1.0], [0.0]])
    softmax = hire.HireSoftmax(
        rows, hire.Quantized.fit(rows, 8), k=1, candidates=1, bias=jnp.asarray([0, 0.5, 4.0, 0])
    )
    x = jnp.ones((1, 1))

    def answer(softmax=softmax, **changes):
        result = softmax.certified(x, **changes)
        return result.proved.tolist(), result.top.indices.tolist(), result.top.values.tolist()

    assert answer() == ([True], [[2]], [[5.0]])
    assert answer(mask=jnp.asarray([True, True, False, True])) == ([True], [[0]], [[4.0]])
    logit_bias = jnp.asarray([-1.0, 2.0, -jnp.inf, 0.0])
    assert answer(logit_bias=logit_bias) == ([True], [[1]], [[5.5]])
    # 5 / 2 - 0.5 is below 4
    penalties = hire.Penalties(jnp.asarray([[2, -1]]), 2.0, 0.5)
    assert answer(penalties=penalties) == ([True], [[0]], [[4.0]])
    capped = dataclasses.replace(softmax, soft_cap=2.0)
    assert answer(capped)[:2] == ([True], [[2]])
    assert answer(capped)[2] == [[pytest.approx(2 * math.tanh(2.5), rel=1e-6)]]


def test_fewer_allowed_tokens_than_places_are_proved_to_be_all(rng):
    rows = jnp.asarray(rng.normal(size=(50, 8)), jnp.float32)
    softmax = hire.HireSoftmax(rows, hire.Quantized.fit(rows, 8), k=4, candidates=6)
    x = jnp.asarray(rng.normal(size=(3, 8)), jnp.float32)
    mask = jnp.arange(50)[None] == jnp.asarray([[7], [8], [9]])
    result = softmax.certified(x, mask=mask)
    assert result.proved.all() and result.top.indices[:, 0].tolist() == [7, 8, 9]
    assert (result.top.values[:, 1:] == -jnp.inf).all()
    assert all(len(set(row)) == 4 for row in result.top.indices.tolist())


def test_a_soft_cap_that_makes_all_logits_equal_hinders_no_proof(rng):
    """In float32 all logits are 0.5; real numbers differ."""
    rows = jnp.asarray(rng.uniform(30, 90, (64, 1)), jnp.float32)
    softmax = hire.HireSoftmax(rows, hire.Quantized.fit(rows, 8), k=3, candidates=16, soft_cap=0.5)
    result = softmax.certified(jnp.ones((1, 1)))
    assert result.proved.all() and (result.top.values == 0.5).all()
    assert result.top.indices.tolist() == jax.lax.top_k(rows.T, 3)[1].tolist()
    shifted = softmax.certified(jnp.ones((1, 1)), logit_bias=jnp.zeros(64))
    assert not shifted.proved.any()  # the cap no longer comes last: nothing tells the logits apart


def test_a_token_that_is_not_allowed_may_hold_anything(rng):
    rows = rng.normal(size=(64, 8)).astype(np.float32)
    estimator = hire.Quantized.fit(rows, 8)
    rows[5] = np.inf
    rows[9, 0] = np.nan
    estimator = dataclasses.replace(estimator.with_error_bounds(rows), fingerprint=None)
    softmax = hire.HireSoftmax(jnp.asarray(rows), estimator, k=4, candidates=30)
    x = jnp.asarray(rng.normal(size=(20, 8)), jnp.float32)
    mask = jnp.ones(64, bool).at[jnp.asarray([5, 9])].set(False)
    result = softmax.certified(x, mask=mask)
    assert result.proved.mean() > 0.5 and not np.isin(result.top.indices, [5, 9]).any()
    assert not softmax.certified(x).proved.any()


def test_numbers_beyond_floats_prove_nothing():
    rows = jnp.asarray([[1.0], [2.0], [3.0]])
    estimator = hire.Quantized.fit(rows, 8)
    softmax = hire.HireSoftmax(
        rows, estimator, k=1, candidates=1, bias=jnp.asarray([-3e38, 3e38, 3e38])
    )
    x = jnp.ones((1, 1))
    for changes in (
        dict(logit_bias=jnp.asarray([0.0, jnp.inf, 0.0])),
        dict(logit_bias=jnp.full(3, 3e38)),
        dict(penalties=hire.Penalties(jnp.asarray([[0, 1, 2]]), 1e-30)),
        dict(penalties=hire.Penalties(jnp.asarray([[0, 1, 2]]), 1.0, -3e38)),
    ):
        assert not softmax.certified(x, **changes).proved.any(), changes


def test_leading_axes_and_many_queries_have_their_own_adjustments(rng):
    rows = jnp.asarray(rng.normal(size=(100, 8)), jnp.float32)
    softmax = hire.HireSoftmax(rows, hire.Quantized.fit(rows, 8), k=3, candidates=20)
    x = jnp.asarray(rng.normal(size=(3, 13, 8)), jnp.float32)  # three steps of up to 16 queries
    mask = jnp.asarray(rng.random((3, 13, 100)) < 0.5)
    tokens = jnp.asarray(rng.integers(0, 100, (3, 13, 5)), jnp.int32)
    presence = jnp.asarray(rng.normal(size=(3, 13)), jnp.float32)
    result = prove(softmax, x, mask=mask, penalties=hire.Penalties(tokens, 1.2, presence))
    assert result.top.indices.shape == (3, 13, 3) and result.proved.shape == (3, 13)
    flat = dict(
        mask=mask.reshape(39, 100),
        penalties=hire.Penalties(tokens.reshape(39, 5), 1.2, presence.reshape(39)),
    )
    flat_result = jax.tree.map(lambda part: part.reshape(39, *part.shape[2:]), result)
    exact = exact_logits(softmax, x.reshape(39, 8), **flat)
    assert not wrong(flat_result, exact, softmax, x.reshape(39, 8)).any()
    assert result.proved.mean() > 0.5
    assert softmax.certified(x[:0], mask=mask[:1]).proved.shape == (0, 13)


def bounds_of_logits(seed: int, b: int = 4, n: int = 2000):
    """Lower bounds, upper bounds and float64 logits of scores of every size."""
    rng = np.random.default_rng(seed)
    scores = (rng.normal(size=(b, n)) * 10.0 ** rng.uniform(-6, 2, (b, n))).astype(np.float32)
    tokens = rng.integers(0, n, (b, n // 2)).astype(np.int32)
    repetition = np.asarray([1.3, 0.7, 2.1, 1.0][:b], np.float32)
    presence, frequency = rng.normal(size=(2, b)).astype(np.float32)
    bias = (rng.normal(size=n) * 10.0 ** rng.uniform(-6, 2, n)).astype(np.float32)
    logit_bias = (rng.normal(size=n) * 10.0 ** rng.uniform(-6, 2, n)).astype(np.float32)
    penalties = hire.Penalties(tokens, repetition, presence, frequency)
    soft_cap = float(rng.choice([0.0, 5.0, 30.0, 1000.0]))
    adjustments = LogitAdjustments(None, jnp.asarray(logit_bias), penalties)

    @jax.jit
    def bounds(scores, adjustments):
        logits = AdjustedLogits.of(
            jnp.asarray(bias), soft_cap, adjustments, jnp.arange(b, dtype=jnp.int32), n
        )
        return logits.logits(scores, -1), logits.logits(scores, 1)

    class Head:
        rows, bias = np.eye(n, dtype=np.float32), None

    head = Head()
    head.bias, head.soft_cap = bias, soft_cap
    exact = exact_logits(head, scores, logit_bias=logit_bias, penalties=penalties)
    return *map(wide, bounds(jnp.asarray(scores), adjustments)), exact


@settings(max_examples=6)
@given(SEEDS)
def test_bounds_of_logits_hold_and_are_narrow(seed):
    lower, upper, exact = bounds_of_logits(seed)
    assert (lower <= exact).all() and (exact <= upper).all()
    assert (upper - lower).max() < 0.05


@pytest.mark.parametrize("size", [0.0, 1 / 64])
def test_bounds_of_logits_that_are_too_narrow_are_seen(monkeypatch, size):
    original = logit_bounds.widened
    monkeypatch.setattr(
        logit_bounds,
        "widened",
        lambda values, error, direction: original(values, error * size, direction),
    )
    lower, upper, exact = bounds_of_logits(0)
    assert (lower > exact).any() and (exact > upper).any()


def test_a_tanh_is_as_exact_as_proofs_assume():
    numbers = np.geomspace(1e-30, 1e3, 400_001).astype(np.float32)
    for options in (AS_SHIPPED, {}):
        computed = wide(jax.jit(jnp.tanh, compiler_options=options)(jnp.asarray(numbers)))
        expected = np.tanh(wide(numbers))
        assert (np.abs(computed - expected) < 2.0**-20 * expected).all()


def test_wrong_bounds_are_seen(monkeypatch, rng):
    """A bound that forgets the bias, the penalties, the mask or the estimator's error."""
    m, d = 300, 16
    rows = rng.normal(size=(m, d)).astype(np.float32)
    x = rng.normal(size=(64, d)).astype(np.float32)
    bias = jnp.asarray(rng.normal(size=m) * 3, jnp.float32)
    tokens = jnp.asarray(rng.integers(0, m, (64, 30)), jnp.int32)
    changes = dict(
        mask=jnp.asarray(rng.random((64, m)) < 0.5), penalties=hire.Penalties(tokens, presence=-5.0)
    )
    softmax = hire.HireSoftmax(
        jnp.asarray(rows), hire.Quantized.fit(rows, 8), k=4, candidates=4, bias=bias
    )
    exact = exact_logits(softmax, x, **changes)

    def num_wrong(softmax=softmax):
        jax.clear_caches()  # they hold programs without the changes below
        return wrong(prove(softmax, x, **changes), exact, softmax, x).sum()

    assert num_wrong() == 0
    low = hire.Quantized.fit(rows, 4)
    guess = dataclasses.replace(low, error_bounds=low.error_bounds * 0)
    assert num_wrong(dataclasses.replace(softmax, estimator=guess)) > 0
    logits = AdjustedLogits.logits
    for name in ("bias", "counts"):

        def forgetful(self, scores, direction, name=name):
            part = dataclasses.replace(self, **{name: None}) if direction == 1 else self
            return logits(part, scores, direction)

        monkeypatch.setattr(AdjustedLogits, "logits", forgetful)
        assert num_wrong() > 0, name
    monkeypatch.setattr(AdjustedLogits, "logits", logits)
    monkeypatch.setattr(AdjustedLogits, "allowed", None)
    assert num_wrong() > 0


def test_top_upper_bounds_of_allowed_rows():
    upper = jnp.asarray([[1.0, jnp.nan, 5.0, -jnp.inf, 3.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    allowed = jnp.asarray([[True, False, True, False, True], [True, False, False, False, False]])
    chosen, others = top_upper_bounds(upper, 2, allowed)
    assert chosen[0].tolist() == [2, 4] and others.tolist() == [1.0, -jnp.inf]
    assert chosen[1, 0] == 0 and len(set(chosen[1].tolist())) == 2


def test_what_cannot_be_proved_is_refused(rng, unchecked):
    rows = jnp.asarray(rng.normal(size=(64, 8)), jnp.float32)
    estimator = hire.Quantized.fit(rows, 8)
    softmax = hire.HireSoftmax(rows, estimator, k=2, candidates=8)
    x = jnp.ones((2, 8))
    with jax.set_mesh(jax.make_mesh((2,), ("chips",))):
        with pytest.raises(ValueError, match="sharded"):
            softmax.sharded("chips").certified(x)
    for changes, message in (
        (dict(rows=estimator), "quantized"),
        (dict(estimator=dataclasses.replace(estimator, error_bounds=None)), "error bounds"),
        (dict(soft_cap=1e30), "soft_cap"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(softmax, **changes).certified(x)
    for name, value in (("mask", jnp.zeros(64, bool)), ("logit_bias", jnp.full(64, jnp.nan))):
        with pytest.raises(ValueError, match=name):
            softmax.certified(x, **{name: value})
