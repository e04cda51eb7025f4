"""The search, the softmax over it, and the choice of k'."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hire
from hire.estimators.exact_rows import ExactRowsEstimator
from hire.ops.nomination import mask_bucket_losers, nominate_from_scores
from hire.tuning import betting_lower_bound, candidates_needed, documents_needed, true_top_k


def problem(rng, m=600, d=16, n=64):
    return jnp.asarray(rng.normal(size=(m, d)), jnp.float32), jnp.asarray(
        rng.normal(size=(n, d)), jnp.float32
    )


@settings(max_examples=12)
@given(
    st.sampled_from([1, 7, 60, 500]),
    st.sampled_from([1, 20]),
    st.sampled_from([1, 5, 20]),
    st.integers(0, 2**31),
    st.booleans(),
)
def test_search_is_the_exact_top_k_of_its_candidates(m, d, b, seed, half):
    rng = np.random.default_rng(seed)
    rows, queries = problem(rng, m, d, b)
    rows = rows.astype(jnp.bfloat16) if half else rows
    k = int(rng.integers(1, min(m, 60) + 1))
    candidates = int(rng.integers(k, m + 1))
    estimator = hire.LowRank.fit(rows, max(1, min(m, d) // 2))
    top = hire.high_recall_top_k(queries, rows, estimator, k=k, candidates=candidates)
    chosen = np.asarray(nominate_from_scores(estimator.scores(queries), candidates))
    exact = np.asarray(queries.astype(rows.dtype), np.float32) @ np.asarray(rows, np.float32).T
    for q in range(b):
        assert len(set(chosen[q].tolist())) == candidates
        expected = np.sort(exact[q, chosen[q]])[::-1][:k]
        np.testing.assert_allclose(top.values[q], expected, rtol=2e-2 if half else 1e-4, atol=1e-4)
        assert set(np.asarray(top.indices[q]).tolist()) <= set(chosen[q].tolist())
        np.testing.assert_allclose(
            exact[q, top.indices[q]], top.values[q], rtol=2e-2 if half else 1e-4, atol=1e-4
        )


@pytest.mark.parametrize("rows, candidates", [(640, 10), (1000, 15), (1000, 16), (63, 1)])
def test_candidates_are_the_best_of_the_pool_or_of_all(rng, rows, candidates):
    scores = jnp.asarray(
        rng.permuted(np.tile(np.arange(float(rows), dtype=np.float32), (3, 1)), axis=1)
    )
    of = mask_bucket_losers(scores) if 64 * candidates <= rows else scores
    assert (
        jnp.sum(mask_bucket_losers(scores) > -jnp.inf, axis=1).tolist()
        == [min(rows, 2 * -(-rows // 64))] * 3
    )
    expected = np.sort(np.argsort(-np.asarray(of), axis=1)[:, :candidates], axis=1)
    assert np.sort(nominate_from_scores(scores, candidates), axis=1).tolist() == expected.tolist()


def test_every_row_a_candidate_is_the_exact_top_k(rng):
    rows, queries = problem(rng)
    top = hire.high_recall_top_k(queries, rows, hire.Quantized.fit(rows, 4), k=8, candidates=600)
    assert (top.indices == hire.exact_top_k(queries @ rows.T, 8).indices).all()


@pytest.mark.parametrize("b", [1, 5])
def test_rows_in_int8_are_searched_as_the_floats_that_they_stand_for(rng, b):
    rows, queries = problem(rng, n=b)
    estimator, small = hire.LowRank.fit(rows, 12, bits=8), hire.Quantized.fit(rows, 8)
    softmax = hire.HireSoftmax(
        small, estimator, k=4, candidates=300
    )  # an estimator of the rows before they were rounded
    floats = np.asarray(small.codes, np.float32) * np.asarray(small.scale)[:, None]
    expected = hire.HireSoftmax(floats, hire.LowRank.fit(floats, 12, bits=8), k=4, candidates=300)
    np.testing.assert_allclose(softmax(queries).values, expected(queries).values, rtol=1e-4)
    assert softmax.bytes_read() == estimator.nbytes + 300 * (16 + 4)
    with pytest.raises(ValueError, match="estimator of other rows"):
        hire.HireSoftmax(hire.Quantized.fit(rows + 1, 8), estimator, k=4, candidates=300)


def test_softmax_is_a_pytree_that_holds_the_rows_once(unchecked, rng):
    rows, queries = problem(rng)
    softmax = hire.HireSoftmax(rows, hire.LowRank.fit(rows, 8, bits=8), k=4, candidates=64)
    assert softmax.rows is rows
    passed = jax.jit(lambda softmax, x: softmax(x))(softmax, queries)
    assert (passed.indices == softmax(queries).indices).all()
    assert softmax.bytes_read() == 600 * 8 + 4 * 600 + 8 * 16 + 4 * 8 + 64 * 16 * 4
    assert (
        "constant"
        not in jax.jit(lambda softmax, x: softmax(x))
        .lower(softmax, queries)
        .as_text()
        .split("600x16")[0]
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(k=0), "k = 0"),
        (dict(k=601), "k = 601: expected a whole number from 1 to 600"),
        (dict(candidates=3), "candidates = 3: expected a whole number from 4 to 600"),
        (dict(candidates=601), "candidates = 601"),
        (dict(rows=jnp.ones((600, 8))), r"estimator of rows \(600, 16\): expected \(600, 8\)"),
    ],
)
def test_a_softmax_that_cannot_be_is_refused_when_built(unchecked, rng, changes, message):
    rows, _ = problem(rng)
    good = dict(rows=rows, estimator=hire.LowRank.fit(rows, 8), k=4, candidates=64)
    with pytest.raises(ValueError, match=message):
        hire.HireSoftmax(**(good | changes))


def test_queries_of_another_width_are_refused(unchecked, rng):
    rows, queries = problem(rng)
    with pytest.raises(ValueError, match=r"queries of shape \(64, 9\): expected \(b, 16\)"):
        hire.high_recall_top_k(queries[:, :9], rows, hire.LowRank.fit(rows, 8), k=4, candidates=64)


def test_candidates_needed_is_the_recall_of_the_search_at_every_depth(rng):
    rows, queries = problem(rng, m=1000)  # up to k' = 15 candidates come from buckets
    estimator = hire.LowRank.fit(rows, 6)
    best = true_top_k(rows, np.asarray(queries), 5)
    needed = candidates_needed(estimator, queries, best.indices)
    for candidates in (5, 10, 15, 16, 40, 300, 1000):
        chosen = nominate_from_scores(estimator.scores(queries), candidates)
        recall, counted = (
            np.asarray(hire.recall(chosen, queries @ rows.T, 5)),
            np.mean(needed <= candidates, axis=1),
        )
        if candidates in (5, 10, 16, 40, 300, 1000):
            np.testing.assert_allclose(counted, recall, atol=1e-6)
        assert (counted <= recall + 1e-6).all() and counted.mean() > recall.mean() - 0.02


def test_choice_is_the_smallest_that_reaches_its_bound(rng):
    rows, queries = problem(rng, n=500)
    estimator, documents = hire.LowRank.fit(rows, 12), np.arange(500) // 5
    choice = hire.choose_candidates(rows, estimator, queries, k=5, recall=0.9, documents=documents)
    needed = candidates_needed(estimator, queries, true_top_k(rows, queries, 5).indices)

    def recall_by_document(candidates):
        return np.mean(needed <= candidates, axis=1).reshape(100, 5).mean(1)

    assert (
        betting_lower_bound(recall_by_document(choice.candidates), 0.95)
        == pytest.approx(choice.bound)
        and choice.bound >= 0.9
    )
    assert betting_lower_bound(recall_by_document(choice.candidates - 1), 0.95) < 0.9
    assert choice.recall == pytest.approx(recall_by_document(choice.candidates).mean())
    assert (choice.queries, choice.documents) == (500, 100)


def test_tuning_takes_the_cheapest_that_meets_the_target(rng):
    rows, queries = problem(rng, n=500)
    estimators = {
        "LR": hire.LowRank.fit(rows, 12),
        "Q8": hire.Quantized.fit(rows, 8),
        "Q4": hire.Quantized.fit(rows, 4),
    }
    tuned = hire.tune(rows, estimators, queries, k=5, recall=0.9)
    costs = {
        name: estimators[name].bytes_read(1) + 4 * 16 * choice.candidates
        for name, (choice, _) in tuned.choices.items()
    }
    assert {name: cost for name, (_, cost) in tuned.choices.items()} == costs
    assert (
        tuned.name == min(costs, key=lambda name: costs[name])
        and tuned.estimator is estimators[tuned.name]
    )
    alone = hire.choose_candidates(rows, estimators["LR"], queries, k=5, recall=0.9)
    assert tuned.choices["LR"][0].candidates >= alone.candidates  # three bounds must hold together
    dearest = hire.tune(
        rows,
        estimators,
        queries,
        k=5,
        recall=0.9,
        cost=lambda estimator, candidates: -estimator.bytes_read(candidates),
    )
    assert dearest.name == "LR"


def test_tuning_for_a_batch_takes_what_was_fastest_and_dense_is_an_answer(rng, monkeypatch):
    rows, queries = problem(rng, n=500)
    estimators = {"LR": hire.LowRank.fit(rows, 12), "Q8": hire.Quantized.fit(rows, 8)}
    options = dict(k=5, recall=0.9, batch=8)
    measured = hire.tune(rows, estimators, queries, **options)
    assert set(measured.choices) == {"LR", "Q8", "dense"}
    assert all(seconds > 0 for _, seconds in measured.choices.values())
    seconds = {name: cost for name, (_, cost) in measured.choices.items()}
    assert measured.name == min(seconds, key=seconds.get)
    assert measured.choices["dense"][0].candidates == len(rows)

    def with_seconds(**seconds):
        """The choice if calls had taken so long; every function is called as it would be timed."""

        def timed(forms, calls, repeats):
            assert all(call.shape == (8, rows.shape[1]) for call in calls)
            results = {name: form(calls[0]) for name, form in forms.items()}
            assert all(top.indices.shape == (8, 5) for top in results.values())
            return {name: [seconds[name]] * repeats for name in forms}

        monkeypatch.setattr(hire.tuning, "interleaved", timed)
        return hire.tune(rows, estimators, queries, **options)

    for wrong, message in (
        (dict(batch=0), "batch = 0"),
        (dict(cost=lambda *_: 1.0), "batch = 8 and a cost"),
        (dict(estimators={"dense": estimators["LR"]}), "'dense'"),
        (dict(estimators={}), "at least one"),
    ):
        with pytest.raises(ValueError, match=message):
            hire.tune(**dict(rows=rows, estimators=estimators, queries=queries) | options | wrong)
    dense = with_seconds(LR=2.0, Q8=3.0, dense=1.0)
    assert (dense.name, dense.estimator, dense.choice.recall) == ("dense", None, 1.0)
    assert with_seconds(LR=2.0, Q8=1.0, dense=1.5).estimator is estimators["Q8"]


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(recall=1.0), "recall = 1.0: expected a number between 0 and 1"),
        (dict(confidence=0), "confidence = 0"),
        (dict(k=0), "k = 0"),
        (dict(queries=jnp.ones((3, 9))), r"queries of shape \(3, 9\)"),
        (
            dict(recall=0.999),
            "500 queries of 500 documents: too few .* expected at least 31[0-9][0-9] documents",
        ),
        (dict(documents=np.arange(500) // 250), "500 queries of 2 documents: too few"),
        (dict(documents=[1, 2]), "2 document labels: expected one for each of the 500"),
    ],
)
def test_a_choice_that_cannot_be_made_is_refused(unchecked, rng, changes, message):
    rows, queries = problem(rng, n=500)
    good = dict(rows=rows, estimator=hire.LowRank.fit(rows, 12), queries=queries, k=5, recall=0.9)
    with pytest.raises(ValueError, match=message):
        hire.choose_candidates(**(good | changes))


def test_fresh_bound_by_hand():
    # All n bets on a mean of 0.5 win: 0.05 * 1.5^n + 0.15 * 1.8^n + 0.8 * 1.98^n is 14.1 after 4 of
    # them, 27.6 after 5.
    assert (
        betting_lower_bound(np.ones(4), 0.94) < 0.5 < betting_lower_bound(np.ones(5), 0.94)
    )  # which asks for 16.7
    assert documents_needed(0.5, 0.94) == 5
    # One all wrong among 6: 0.05 * 0.5 * 1.5^5 + 0.15 * 0.2 * 1.8^5 + 0.8 * 0.02 * 1.98^5 is 1.244,
    # which a confidence of 0.196 asks for.
    assert (
        betting_lower_bound(np.asarray([0.0, 1, 1, 1, 1, 1]), 0.19)
        > 0.5
        > betting_lower_bound(np.asarray([0.0, 1, 1, 1, 1, 1]), 0.20)
    )
    assert (
        betting_lower_bound(np.ones(documents_needed(0.99, 0.95)), 0.95)
        >= 0.99
        > betting_lower_bound(np.ones(documents_needed(0.99, 0.95) - 1), 0.95)
    )
    assert betting_lower_bound(np.zeros(10), 0.95) == 0


def test_fresh_bound_holds_as_often_as_it_says_whatever_the_distribution(rng):
    """Also where nearly all documents are right and a rare one is all wrong."""
    draws = {
        "rare": lambda: (rng.random(80) > 0.02).astype(float),
        "spread": lambda: rng.beta(9, 1, 80),
    }
    for name, mean in (("rare", 0.98), ("spread", 0.9)):
        below = [betting_lower_bound(draws[name](), 0.9) <= mean for _ in range(300)]
        assert np.mean(below) >= 0.9


search = jax.jit(hire.high_recall_top_k, static_argnames=("k", "candidates"))


@given(st.integers(0, 10**6), st.sampled_from([(4096, 256, 32), (700, 700, 700)]))
def test_a_cascade_is_its_stages_one_after_the_other(seed, sizes):
    m, first, last = sizes
    rows, queries = problem(np.random.default_rng(seed), m=m, n=4)
    stages = hire.LowRank.fit(rows, 6, bits=8), hire.Quantized.fit(rows, 8)
    cascade = hire.Cascade(stages, (first,))
    result = search(queries, rows, cascade, k=4, candidates=last)
    chosen = np.asarray(nominate_from_scores(stages[0].scores(queries), first))
    guessed = np.take_along_axis(np.asarray(stages[1].scores(queries)), chosen, 1)
    kept = np.take_along_axis(chosen, np.argsort(-guessed, 1)[:, :last], 1)
    exact = np.take_along_axis(np.asarray(queries @ rows.T), kept, 1)
    expected = np.take_along_axis(kept, np.argsort(-exact, 1)[:, :4], 1)
    np.testing.assert_array_equal(np.sort(result.indices, 1), np.sort(expected, 1))
    assert isinstance(cascade, hire.Estimator)
    scores = np.asarray(cascade.scores(queries))  # the second keeps its scores
    np.testing.assert_allclose(np.take_along_axis(scores, chosen, 1), guessed, rtol=1e-5, atol=1e-5)
    assert hire.HireSoftmax(rows, cascade, 4, last)(queries).indices.shape == (4, 4)


def test_bytes_of_a_cascade_by_hand(rng):
    rows, _ = problem(rng, m=1000)  # of width 16
    cascade = hire.Cascade((hire.Quantized.fit(rows, 4), hire.Quantized.fit(rows, 8)), (100,))
    assert cascade.nbytes == 1000 * (8 + 4) + 1000 * (16 + 4)
    assert cascade.bytes_read(10) == 1000 * (8 + 4) + 100 * (16 + 4)
    with pytest.raises(
        ValueError,
        match=r"stage_sizes = \(\) of 2 estimators: expected falling "
        r"numbers",
    ):
        hire.Cascade(cascade.estimators, ())
    with pytest.raises(ValueError, match="expected all to be of the same"):
        hire.Cascade((cascade, hire.Quantized.fit(rows[:500], 8)), (100,))


def test_the_chosen_candidates_give_a_cascade_its_target_recall(rng):
    """Also where its first estimator drops true rows, whose first scores, if they counted, would
    put them among the best.
    """
    rows, queries = problem(rng, n=400)
    cascade = hire.Cascade((hire.LowRank.fit(rows, 6), hire.Quantized.fit(rows, 8)), (120,))
    best = true_top_k(rows, np.asarray(queries), 5)
    needed = candidates_needed(cascade, queries, best.indices)
    for candidates in (5, 8, 40, 120):
        result = hire.high_recall_top_k(queries, rows, cascade, k=5, candidates=candidates)
        np.testing.assert_allclose(
            np.mean(needed <= candidates, 1),
            hire.recall(result.indices, queries @ rows.T, 5),
            atol=1e-6,
        )
    assert hire.choose_candidates(rows, cascade, queries, k=5, recall=0.8).candidates <= 120
    with pytest.raises(ValueError, match="at most 120 rows.* 0.99 is asked for"):
        hire.choose_candidates(rows, cascade, queries, k=5, recall=0.99)
    with pytest.raises(ValueError, match="candidates = 121: expected a whole number from 5 to 120"):
        hire.HireSoftmax(rows, cascade, 5, 121)


def test_a_cascade_corrects_what_its_first_estimates_lack_in_a_sum(rng):
    rows, queries = problem(rng, n=200)
    first = hire.LowRank.fit(rows, 8)
    exact = np.log(np.exp(np.asarray(queries @ rows.T, np.float64)).sum(1))
    off = {}
    for name, estimator, candidates in (
        ("one", first, 8),
        ("cascade", hire.Cascade((first, hire.Quantized.fit(rows, 8)), (120,)), 8),
    ):
        off[name] = np.abs(
            np.asarray(
                hire.HireSoftmax(rows, estimator, 5, candidates)
                .top_k_with_normalizer(queries)
                .log_normalizer
            )
            - exact
        )
    scores = np.asarray(first.scores(queries), np.float64)
    uncorrected = np.abs(np.log(np.exp(scores).sum(1)) - exact)
    assert (
        off["cascade"].mean() < 0.5 * uncorrected.mean()
        and off["cascade"].mean() < off["one"].mean()
    )


def test_rows_with_the_largest_errors_are_scored_exactly(rng):
    rows, queries = problem(rng, m=300)
    rows = rows.at[jnp.asarray([7, 100])].mul(20.0)  # a 4-bit estimator errs most in their scores
    estimator = hire.Quantized.fit(rows, 4)
    kept = ExactRowsEstimator.fit(rows, estimator, 2, calibration=queries)
    assert kept.exact_indices.tolist() == [7, 100]
    assert (
        kept.nbytes - estimator.nbytes
        == kept.bytes_read(5) - estimator.bytes_read(5)
        == 2 * (16 * 4 + 4)
    )
    exact, output = np.asarray(queries @ rows.T), np.asarray(kept.scores(queries))
    np.testing.assert_allclose(output[:, [7, 100]], exact[:, [7, 100]], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(
        np.delete(output, [7, 100], 1),
        np.delete(np.asarray(estimator.scores(queries)), [7, 100], 1),
    )
    some = jnp.asarray(rng.integers(0, 300, (len(queries), 5)).astype(np.int32)).at[:, 0].set(100)
    np.testing.assert_allclose(
        kept.scores_at(queries, some),
        np.take_along_axis(output, np.asarray(some), 1),
        rtol=1e-4,
        atol=1e-4,
    )
    assert isinstance(kept, hire.Estimator)
    batched = ExactRowsEstimator.fit(
        rows, estimator, 2, calibration=iter([queries[:30], queries[30:]])
    )
    assert batched.exact_indices.tolist() == [7, 100]
    top = hire.HireSoftmax(rows, kept, 4, 60)(queries)
    assert (top.indices[:, :1] == jnp.argmax(queries @ rows.T, axis=1)[:, None]).mean() > 0.9
    with pytest.raises(ValueError, match=r"count = 301: expected a whole number from 1 to 300"):
        ExactRowsEstimator.fit(rows, estimator, 301, calibration=queries)
    with pytest.raises(ValueError, match="calibration has 0 queries"):
        ExactRowsEstimator.fit(rows, estimator, 1, calibration=queries[:0])
    with pytest.raises(ValueError, match="estimator of other rows"):
        ExactRowsEstimator.fit(rows + 1, estimator, 1, calibration=queries)
