"""The kernels for a CPU against their references in plain JAX, on guarded memory, from several
threads, and where they cannot run.
"""

import os
import platform
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hire
from hire.ops import cpu

if (sys.platform, platform.machine()) != cpu.SEEN_TO_WORK:
    pytest.skip("the CPU kernels are for Linux on x86-64", allow_module_level=True)
# There they must run: a broken numba is a failure, not a skip.
if not cpu.is_available():
    raise RuntimeError(cpu.problem())

from guarded_calls import guarded_call

from hire.models.attention import attend
from hire.ops.activations import ACTIVATIONS
from hire.ops.cpu import (
    attention,
    bucket_scores,
    example_arguments,
    ffi,
    group_ffn,
    group_nomination,
    programs,
    queries,
    row_scores,
    row_sums,
    selection,
)
from hire.ops.quantization import QuantizedRows, dequantize, quantize
from hire.ops.row_products import row_scores as scores_of_rows
from hire.ops.row_products import row_scores_at, weighted_row_sum
from hire.ops.top_k import exact_top_k

STORAGES = st.sampled_from(["float32", "bfloat16", "int8", "int4"])
SEEDS = st.integers(0, 2**31)
BATCHES = st.sampled_from([1, 2, 3, 4, 5, 8, 16, 17])


def close(result, expected, tolerance=1e-5):
    """float32 sums in another order."""
    assert result.shape == expected.shape and result.dtype == np.float32
    np.testing.assert_allclose(result, expected, atol=tolerance * float(np.abs(expected).max()))


@settings(max_examples=10)
@given(STORAGES, BATCHES, st.integers(1, 150), st.integers(1, 150), SEEDS)
def test_scores_are_products_with_the_rows(storage, b, m, d, seed):
    x, rows, _ = example_arguments.of_rows(storage, b=b, c=1, m=m, d=d, seed=seed)
    expected = np.asarray(x, np.float64) @ np.asarray(dequantize(rows), np.float64).T
    close(row_scores.scores(x, rows), expected)
    close(scores_of_rows(x, rows, "cpu"), expected)


@settings(max_examples=10)
@given(STORAGES, BATCHES, st.integers(1, 150), st.integers(1, 600), SEEDS)
def test_sums_are_products_with_the_columns(storage, b, m, d, seed):
    _, rows, _ = example_arguments.of_rows(storage, b=b, c=1, m=m, d=d, seed=seed)
    weights = jax.random.normal(jax.random.key(seed), (b, m))
    expected = np.asarray(weights, np.float64) @ np.asarray(dequantize(rows), np.float64)
    close(row_sums.sums(weights, rows), expected)
    in_two = weighted_row_sum(jnp.stack([weights, -weights]), rows, "cpu")
    close(in_two, np.stack([expected, -expected]))


@settings(max_examples=10)
@given(STORAGES, BATCHES, st.integers(1, 150), st.integers(1, 150), st.integers(1, 70), SEEDS)
def test_a_search_is_gathering_multiplying_and_selecting(storage, b, m, d, c, seed):
    x, rows, indices = example_arguments.of_rows(storage, b=b, c=c, m=m, d=d, seed=seed)
    exact = row_scores.scores_at(x, rows, indices)
    products = np.asarray(x, np.float64) @ np.asarray(dequantize(rows), np.float64).T
    close(exact, np.take_along_axis(products, np.asarray(indices), axis=1))
    for k in {1, (c + 1) // 2, c}:
        top, expected = row_scores.top_k_at(x, rows, indices, k), exact_top_k(exact, k)
        np.testing.assert_array_equal(top.values, expected.values)
        np.testing.assert_array_equal(
            top.indices, np.take_along_axis(np.asarray(indices), np.asarray(expected.indices), 1)
        )


def test_indices_beyond_the_rows_and_negative_ones_are_those_of_numpy_and_of_the_nearest_row():
    rows = jnp.repeat(jnp.arange(1.0, 6.0)[:, None], 3, axis=1)
    found = row_scores.scores_at(jnp.ones((1, 3)), rows, jnp.asarray([[0, 4, 5, 99, -1, -5, -99]]))
    assert found.tolist() == [[3.0, 15.0, 15.0, 15.0, 15.0, 3.0, 3.0]]


def test_of_equal_scores_the_lower_index_comes_first_and_nan_before_all():
    rows = jnp.asarray([[1.0], [2.0], [2.0], [jnp.nan], [-jnp.inf], [jnp.inf]])
    top = row_scores.top_k_at(jnp.ones((1, 1)), rows, jnp.asarray([[4, 2, 0, 1, 3, 5]]), 6)
    assert top.indices.tolist() == [[3, 5, 1, 2, 0, 4]]
    assert np.isnan(top.values[0, 0]) and top.values[0, 1:].tolist() == [
        np.inf,
        2.0,
        2.0,
        1.0,
        -np.inf,
    ]


@settings(max_examples=10)
@given(
    st.sampled_from([8, 4]),
    BATCHES,
    st.integers(1, 700),
    st.integers(16, 200),
    st.integers(1, 4),
    SEEDS,
    st.data(),
)
def test_nomination_is_the_two_stage_top_k_of_the_reference(bits, b, m, d, per_bucket, seed, data):
    d = max(d, queries.COLUMNS_PER_STEP[bits])
    x, rows, _ = example_arguments.of_rows(f"int{bits}", b=b, c=1, m=m, d=d, seed=seed)
    assert queries.is_supported(rows)
    buckets = data.draw(st.integers(-(-m // 100), m))
    depth = -(-m // buckets)
    candidates = data.draw(st.integers(1, min(m, buckets * min(per_bucket, depth))))
    found = bucket_scores.nominate(x, rows, candidates, buckets=buckets, per_bucket=per_bucket)
    scores = bucket_scores.scores_reference(x, rows)
    expected = hire.ops.top_k.bucketed_indices(scores, candidates, buckets, per_bucket)
    # Where buckets have fewer rows than winners, both fill up with rows of their own choice.
    if candidates <= m // depth * min(per_bucket, depth):
        np.testing.assert_array_equal(found, expected)
    assert ((found >= 0) & (found < m)).all()


@settings(max_examples=10)
@given(st.sampled_from([8, 4]), st.integers(1, 300), SEEDS)
def test_a_rounded_query_is_off_by_half_a_step_per_entry_and_its_rounding(bits, d, seed):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.standard_normal((3, d)) * 10.0 ** rng.integers(-30, 30), jnp.float32)
    rows = quantize(jnp.asarray(rng.standard_normal((9, d)), jnp.float32), bits)
    rounded = queries.round_queries(x, rows)
    values = (
        np.asarray(rounded.integers, np.float64) * np.asarray(rounded.step, np.float64)[:, None]
    )
    limit = 0.505 * np.asarray(rounded.step, np.float64)[:, None]
    assert (np.abs(values - np.asarray(x, np.float64)) <= limit).all()
    largest_sum = d * (2 ** (bits - 1)) * np.abs(np.asarray(rounded.integers, np.int64)).max()
    assert largest_sum < 2**31


def test_a_rounded_query_by_hand():
    rows = QuantizedRows(jnp.ones((1, 16), jnp.int8), jnp.ones(1), 8, 16)
    x = jnp.zeros((1, 16)).at[0, 3].set(-2.0).at[0, 5].set(1.0)
    rounded = queries.round_queries(x, rows)
    assert rounded.integers[0, 3] == -32767 and rounded.integers[0, 5] == 16384  # 16383.5, to even
    np.testing.assert_allclose(rounded.step, 2.0 / 32767)
    assert rounded.planes.tolist() == rounded.integers.tolist()  # 16 columns are one step


@settings(max_examples=10)
@given(
    STORAGES,
    st.sampled_from(ACTIVATIONS),
    st.sampled_from([1, 3, 8]),
    st.booleans(),
    st.sampled_from([1, 5, 8, 16, 19]),
    st.integers(1, 40),
    st.integers(1, 70),
    SEEDS,
    st.data(),
)
def test_the_ffn_kernel_is_its_reference(
    storage, activation, b, is_shared, group, groups, d, seed, data
):
    c = data.draw(st.integers(1, groups))
    k = data.draw(st.integers(1, c))
    num_static = data.draw(st.integers(0, k))
    x, up, down, gate, chosen = example_arguments.of_groups(
        storage, b=b, calls=1 if is_shared else b, c=c, groups=groups, group=group, d=d, seed=seed
    )
    how = dict(group=group, k=k, num_static=num_static, activation=activation)
    gates = (None, None) if activation == "relu" else (gate, dequantize(gate))
    result = group_ffn.ffn(x, up, down, chosen, gate=gates[0], **how)
    expected = group_ffn.reference(
        x, dequantize(up), dequantize(down), chosen, gate=gates[1], **how
    )
    close(result, expected, 2e-5)


def test_the_ffn_kernel_by_hand():
    up = jnp.zeros((6, 2)).at[2, 0].set(3.0).at[5, 1].set(2.0).at[4, 1].set(-9.0)
    down = jnp.arange(12.0).reshape(6, 2)
    x, how = jnp.asarray([[1.0, 2.0]]), dict(group=2)
    # Groups of two neurons: the second one is active with 3 (row 2), the third with 4 (row 5).
    groups = jnp.asarray([[0, 1, 2]])
    assert group_ffn.ffn(x, up, down, groups, k=1, **how).tolist() == [[40.0, 44.0]]
    assert group_ffn.ffn(x, up, down, groups, k=2, **how).tolist() == [[52.0, 59.0]]
    kept = group_ffn.ffn(x, up, down, jnp.asarray([[1, 2]]), k=1, num_static=1, **how)
    assert kept.tolist() == [[12.0, 15.0]]


@settings(max_examples=10)
@given(st.integers(1, 500), SEEDS, st.data())
def test_the_kth_largest_integer_is_that_of_a_sort(m, seed, data):
    rng, k = np.random.default_rng(seed), data.draw(st.integers(1, m))
    limit = data.draw(st.sampled_from([3, 2**10, 2**31]))
    keys = rng.integers(-limit, limit, m).astype(np.int32)
    threshold, above = callable_from_python(selection.kth_largest)(
        keys, k, np.zeros(selection.DIGITS, np.int32)
    )
    assert threshold == np.sort(keys)[::-1][k - 1] and above == (keys > threshold).sum()


def callable_from_python(function):
    """Return the same numba function with a wrapper for Python."""
    from numba import njit

    return njit(function.py_func, error_model="numpy")


def numpy_argument(part):
    """A kernel sees the bits of bfloat16."""
    array = np.asarray(part)
    return array.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else array


@settings(max_examples=30)
@given(
    st.sampled_from(["scores", "sums", "search", "nominate", "ffn", "groups", "attention"]),
    STORAGES,
    st.sampled_from([1, 2, 5, 8]),
    st.integers(1, 90),
    st.integers(1, 90),
    st.booleans(),
    st.integers(1, 3),
    SEEDS,
)
def test_kernels_stay_within_their_buffers(what, storage, b, m, d, at_end, threads, seed):
    """Memory before and after every buffer ends the process; arguments are read-only."""
    x, rows, indices = example_arguments.of_rows(storage, b=b, c=2 * m, m=m, d=d, seed=seed)
    indices = indices * 3 - m  # also beyond the rows
    matrix = [numpy_argument(part) for part in row_scores.kernel_operands(rows)]
    padded = np.asarray(row_scores.pad_query(x, rows))
    if what == "scores":
        kernel, arguments = row_scores.scores_kernel(storage), [padded, *matrix]
        shapes = [(b, m)]
    elif what == "sums":
        kernel, arguments = row_sums.kernel(storage), [np.ones((b, m), np.float32), matrix[0]]
        shapes = [padded.shape, (3, *padded.shape)]
    elif what == "search":
        kernel, k = row_scores.search_kernel(storage), m
        arguments = [padded, *matrix, np.asarray(indices, np.int32)]
        shapes = [(b, 2 * m), (b, k), (b, k), (b, k)]
    elif what == "nominate":
        bits, d = (8 if storage == "int8" else 4), max(d, 64)
        x, rows, _ = example_arguments.of_rows(f"int{bits}", b=b, c=1, m=m, d=d, seed=seed)
        rounded = queries.round_queries(x, rows)
        kernel, buckets = bucket_scores.kernel(rounded.storage), -(-m // 3)
        arguments = [np.asarray(part) for part in (rounded.planes, rows.codes, rows.scale)]
        shapes = [(b, buckets), (b, 2, buckets), (b, buckets), (b, selection.DIGITS)]
    elif what == "groups":
        kernel, calls = group_nomination.kernel(), b if at_end else 1
        arguments = [np.abs(padded), np.asarray([1, 2], np.int32)]
        shapes = [(calls, 3), (calls, padded.shape[1]), (calls, selection.DIGITS)]
    elif what == "attention":
        storage = "float32" if storage.startswith("int") else storage
        cache = example_arguments.of_attention(storage, b=b, h=6, n=2, s=m, e=d, seed=seed)
        queries_, keys, values, new_keys, new_values, mask = map(numpy_argument, cache)
        kernel, flat = attention.kernel(storage), (b, m, 2 * d)
        arguments = [queries_, keys.reshape(flat), values.reshape(flat), mask.astype(np.int32)]
        arguments += [new_keys, new_values]
        shapes = [(b, 6, d), (b, 6, m + 1), (2 * b, 6, d), (b, 2, 6), (b, 2, 6)]
    else:
        kernel = group_ffn.kernel(storage, "silu")
        options = np.asarray([m, 1, 0], np.int32)
        groups = np.asarray(indices, np.int32)
        arguments = [padded, groups, options, *matrix, *matrix, *matrix]
        sizes = (b, 2 * m, 1)
        shapes = [padded.shape, sizes, sizes, sizes[:2], (b, selection.DIGITS), (2, *padded.shape)]
    guarded_call(kernel, arguments, shapes, at_end=at_end, threads=threads)


def test_the_guard_pages_end_a_process_that_reads_beyond_a_buffer():
    script = (
        "import ctypes, numpy as np\n"
        "from guarded_calls import Guarded\n"
        "guarded = Guarded(np.zeros(7, np.float32), True, True)\n"
        "assert ctypes.c_float.from_address(guarded.address + 24).value == 0\n"
        "print('within', flush=True)\n"
        "ctypes.c_float.from_address(guarded.address + 28).value\n"
    )
    environment = os.environ | dict(PYTHONPATH=str(Path(__file__).parent))
    ended = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert ended.stdout == "within\n" and ended.returncode < 0


def test_buffers_that_do_not_fit_are_an_error_of_the_call():
    x, rows, indices = example_arguments.of_rows("float32", b=2, c=5, m=9, d=4)
    scale = jnp.zeros(0, jnp.float32)
    kernel = row_scores.search_kernel("float32")
    fitting = [(2, 5), (2, 3), (2, 3), (2, 3)]
    kernel(x, rows, scale, indices, results=fitting)
    wrong_shapes = [[(3, 5), *fitting[1:]], [*fitting[:1], (2, 6), (2, 6), (2, 6)]]
    for shapes in wrong_shapes:
        with pytest.raises((ValueError, RuntimeError), match="hire_search_float32"):
            jax.block_until_ready(kernel(x, rows, scale, indices, results=shapes))
    with pytest.raises((ValueError, RuntimeError), match="hire_search_float32"):
        wrong_type = kernel(x, rows.astype(jnp.bfloat16), scale, indices, results=fitting)
        jax.block_until_ready(wrong_type)
    with pytest.raises(ValueError, match="buffers"):
        guarded_call(
            kernel,
            [np.ones((2, 4), np.float32), np.ones((9, 4), np.float32), np.zeros(3, np.float32)]
            + [np.zeros((2, 5), np.int32)],
            fitting,
            at_end=True,
            threads=1,
        )


def test_calls_from_several_threads_at_once_do_not_meet():
    parts = [example_arguments.of_rows("int8", b=2, c=40, m=3000, d=64, seed=s) for s in range(4)]

    @jax.jit
    def search(x, rows):
        candidates = bucket_scores.nominate(x, rows, 40, buckets=50, per_bucket=2)
        return row_scores.top_k_at(x, rows, candidates, 8)

    expected = [jax.device_get(search(x, rows)) for x, rows, _ in parts]
    differing = []

    def run(place):
        x, rows, _ = parts[place]
        for _ in range(50):
            for one, other in zip(search(x, rows), expected[place], strict=True):
                if not np.array_equal(one, other):
                    differing.append(place)

    threads = [threading.Thread(target=run, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not differing


def test_kernels_run_under_vmap_and_give_derivatives_of_the_plain_form():
    x, rows, indices = example_arguments.of_rows("float32", b=3, c=6, m=20, d=5)
    by_query = jax.vmap(lambda x, indices: row_scores.scores_at(x[None], rows, indices[None])[0])
    np.testing.assert_allclose(
        by_query(x, indices), row_scores.scores_at(x, rows, indices), rtol=1e-5
    )
    slopes = [
        jax.grad(lambda x, how=how: jnp.sum(row_scores_at(x, rows, indices, 1, how) ** 2))(x)
        for how in ("cpu", "xla")
    ]
    np.testing.assert_allclose(*slopes, rtol=1e-4)


def test_where_the_compiler_divides_arrays_it_gathers_none_for_a_kernel():
    x, rows = jnp.ones((8, 16)), jnp.arange(64.0)[:, None] * jnp.ones((1, 16))

    def both(x, rows):
        products = scores_of_rows(x, rows)
        return products, weighted_row_sum(products, rows)

    assert "hire_scores_float32" in jax.jit(both).lower(x, rows).as_text()
    mesh = jax.make_mesh((4,), ("chips",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        divided = jax.device_put(
            rows, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("chips"))
        )
        program = jax.jit(both).lower(x, divided).compile()
        products, sums = program(x, divided)
    assert "hire_" not in program.as_text() and "all-gather" not in program.as_text()
    np.testing.assert_array_equal(products, np.broadcast_to(16.0 * np.arange(64.0), (8, 64)))
    np.testing.assert_array_equal(sums, np.full((8, 16), 16.0 * (np.arange(64.0) ** 2).sum()))


def test_one_program_serves_all_its_symbols_from_itself(tmp_path, monkeypatch):
    """Programs that two processes compiled have functions of the same names in them."""
    monkeypatch.setattr(programs, "folder", lambda: tmp_path)
    function = ffi.function
    two = [
        programs.load_program(f"hire_test_{n}", lambda n=n: function(lambda frame: frame + n))
        for n in (1, 2)
    ]
    import ctypes

    add = [ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(program.address) for program in two]
    assert [call(40) for call in add] == [41, 42] and not two[0].was_on_disk
    again = programs.load_program("hire_test_1", pytest.fail)
    assert again.was_on_disk
    assert ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(again.address)(1) == 2


def test_a_program_is_named_after_the_sources_that_were_imported(monkeypatch):
    """Sources that change while a process runs are not those that it compiles."""
    name = programs.key()
    programs.key.cache_clear()
    monkeypatch.setattr("pathlib.Path.read_bytes", lambda path: b"changed")
    assert programs.key() == name


@settings(max_examples=20)
@given(st.data(), st.booleans(), SEEDS)
def test_nominated_groups_are_those_of_the_reference(data, share, seed):
    b, m = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 200))
    k, c, num_static = (data.draw(st.integers(low, m)) for low in (1, 1, 0))
    # Powers of two: divided by one another they are exact, and many of them are equal.
    scores = jnp.exp2(jax.random.randint(jax.random.key(seed), (b, m), -9, 9).astype(jnp.float32))
    scores = jnp.where(jax.random.uniform(jax.random.key(seed + 1), (b, m)) < 0.3, 0.0, scores)
    nominated = np.asarray(
        group_nomination.nominate(scores, c, k=k, share=share, num_static=num_static)
    )
    if share:
        kth = jnp.sort(scores, axis=1)[:, m - k, None]
        scores = jnp.max(scores / jnp.where(kth > 0, kth, 1.0), axis=0)[None]
    expected = np.sort(np.asarray(exact_top_k(scores, c).indices), axis=1)
    np.testing.assert_array_equal(nominated[:, num_static:] - num_static, expected)
    assert nominated[:, :num_static].tolist() == [list(range(num_static))] * len(nominated)


def test_a_query_that_is_not_finite_does_not_choose_for_others():
    scores = jnp.asarray([[1.0, 2.0, 8.0, 4.0], [jnp.inf, 0.0, 0.0, 0.0], [9.0, jnp.nan, 0.0, 0.0]])
    shared = group_nomination.nominate(scores, 2, k=1, share=True, num_static=1)
    assert shared.tolist() == [[0, 3, 4]]
    alone = group_nomination.nominate(scores, 2, k=1, share=False)
    assert alone.tolist() == [[2, 3], [0, 1], [0, 1]]


@settings(max_examples=20)
@given(st.sampled_from([jnp.float32, jnp.bfloat16]), st.data(), SEEDS)
def test_attention_to_a_cache_is_its_reference(dtype, data, seed):
    b, n, group = (data.draw(st.integers(1, most)) for most in (3, 3, 6))
    s, e = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 40))
    queries, *others, mask = example_arguments.of_attention(
        str(jnp.dtype(dtype)), b=b, h=n * group, n=n, s=s, e=e, seed=seed
    )
    keys, values, new_keys, new_values = (part.astype(jnp.float32) for part in others)
    expected = attend(
        queries[:, None],
        (keys, values, mask[None]),
        (new_keys[:, None], new_values[:, None], jnp.ones((1, 1), bool)),
    )[:, 0]
    keys, values, new_keys, new_values = others
    result = attention.attend(queries, keys, values, mask, new_keys, new_values)
    np.testing.assert_allclose(result, expected, atol=1e-5)


def test_attention_by_hand():
    queries, keys = jnp.ones((1, 1, 1)), jnp.log(jnp.asarray([1.0, 3.0])).reshape(1, 2, 1, 1)
    values, new_value = jnp.asarray([1.0, 5.0]).reshape(1, 2, 1, 1), jnp.full((1, 1, 1), 2.0)
    arguments = queries, keys, values
    new = jnp.zeros((1, 1, 1)), new_value
    for mask, expected in (([1, 1], 18 / 5), ([1, 0], 3 / 2), ([0, 0], 2.0)):
        result = attention.attend(*arguments, jnp.asarray(mask, bool), *new)
        np.testing.assert_allclose(result, [[[expected]]], rtol=1e-6)
    overflow = attention.attend(queries * 1e30, keys, values, jnp.ones(2, bool), *new)
    assert overflow.tolist() == [[[5.0]]]
    nothing = attention.attend(queries * jnp.nan, keys, values, jnp.ones(2, bool), *new)
    assert np.isnan(nothing).all()


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text"])
def test_a_damaged_program_is_compiled_anew(damage, tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "folder", lambda: tmp_path)

    def make():
        return ffi.function(lambda frame: frame * 2)

    programs.load_program("hire_test", make)
    [path] = tmp_path.iterdir()
    content = path.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    path.write_bytes(dict(cut=content[:-9], flipped=flipped, empty=b"", text=b"x" * 99)[damage])
    assert not programs.load_program("hire_test", make).was_on_disk
    assert path.read_bytes()[:32] == content[:32] or len(path.read_bytes()) > 99
    assert programs.load_program("hire_test", pytest.fail).was_on_disk


def test_a_kernel_asked_for_by_name_never_falls_back():
    rows = jnp.ones((100, 4), jnp.float16)
    half = hire.Quantized.fit(rows, 8)
    with pytest.raises(ValueError, match="implementation = 'cpu'"):  # rows of float16
        hire.high_recall_top_k(
            jnp.ones((1, 4)), rows, half, k=1, candidates=1, implementation="cpu"
        )
    wide = hire.Quantized.fit(jnp.ones((200, 64)), 4)
    with pytest.raises(ValueError, match="implementation = 'cpu'"):  # candidates beyond buckets
        wide.nominate(jnp.ones((1, 64)), 190, implementation="cpu")
    low_rank = hire.LowRank.fit(jnp.eye(64), 16)
    with pytest.raises(ValueError, match="implementation = 'cpu'"):  # factors of floats
        low_rank.nominate(jnp.ones((1, 64)), 1, implementation="cpu")
    layer = dict(up=jnp.ones((64, 16)), down=jnp.ones((64, 16), jnp.bfloat16))
    with pytest.raises(ValueError, match="implementation = 'cpu'"):  # two types
        hire.HireFFN(
            **layer, estimator=hire.Quantized.fit(jnp.ones((64, 16)), 8), implementation="cpu"
        )


@pytest.mark.parametrize(
    "arrange, reason",
    [
        ("sys.modules['numba'] = None", "numba"),
        ("import platform; platform.machine = lambda: 'arm64'", "x86_64, not linux arm64"),
        ("sys.platform = 'win32'", "not win32"),
        ("import types; sys.modules['numba'] = types.ModuleType('numba')", "numba does not work"),
    ],
)
def test_where_the_kernels_cannot_run_xla_does_and_asking_by_name_is_one_line(arrange, reason):
    script = f"""
import sys, warnings
import jax.numpy as jnp
import hire
{arrange}
rows = jnp.arange(640.0).reshape(128, 5) % 7
estimator = hire.Quantized.fit(rows, 8)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    top = hire.high_recall_top_k(rows[:2], rows, estimator, k=1, candidates=2)
print(len(caught), top.values[:, 0].tolist())
try:
    hire.HireSoftmax(rows, estimator, 1, 2, implementation="cpu")
except ValueError as error:
    print(error)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-800:]
    first, message, *others = ended.stdout.splitlines()
    rows = np.arange(640.0).reshape(128, 5) % 7
    assert not others and reason in message and message.startswith("implementation = 'cpu': ")
    broken = "does not work" in reason
    assert first == f"{int(broken)} {(rows[:2] @ rows.T).max(1).tolist()}"
