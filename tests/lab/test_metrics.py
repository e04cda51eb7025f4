"""Quality: sliding windows and what a search changes, by hand; the harness's adapter against the
model; tasks that fail.
"""

import json
import zipfile
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from lm_eval.api.instance import Instance

import hire
from hire.lab.data import model_states, questions
from hire.lab.data.text import Document
from hire.lab.metrics import intervals, lm_eval_tasks, model_quality
from hire.lab.metrics.lm_eval_model import LENGTHS, Harness, request_seed
from hire.models import TextModel
from hire.models.tokenizer import byte_tokenizer, train_tokenizer
from hire.storage import digest

TEXTS = [
    Document("one", "novel", "Call me Ishmael. Some years ago, never mind how long."),
    Document("two", "novel", "The sea."),
]


@pytest.fixture(scope="module")
def subject(tiny):
    return TextModel(tiny, byte_tokenizer(), "random weights")


@pytest.fixture(scope="module")
def without_first(subject):
    """The same model with texts that have no first token, as SmolLM2 has it."""
    return replace(subject, first_token=None, end_tokens=(0, 3))


@pytest.fixture(scope="module")
def softmax(tiny):
    return hire.HireSoftmax(tiny.embedding[...], hire.LowRank.fit(tiny.embedding[...], 24), 8, 40)


@partial(jax.jit, static_argnames="graph")
def all_log_p(graph, state, tokens):
    model = nnx.merge(graph, state)
    return jax.nn.log_softmax(model.logits(model.prefill(tokens)[0])[0])


def log_p(model, tokens):
    """log p (t - 1,) of every token after the first, all from one text that is padded behind
    them, and the likeliest tokens.
    """
    filled = np.zeros((1, 100), np.int32)
    filled[0, : len(tokens) - 1] = tokens[:-1]
    output = np.asarray(all_log_p(*nnx.split(model), filled))[: len(tokens) - 1]
    return output[np.arange(len(output)), tokens[1:]], output.argmax(1)


def test_every_token_is_asked_for_once_with_its_context():
    windows = model_states.sliding(np.asarray([2, *range(10, 20)]), 4, 2)
    assert [(list(tokens), count) for tokens, count in windows] == [
        ([2, 10, 11, 12, 13], 4),
        ([2, 12, 13, 14, 15], 2),
        ([2, 14, 15, 16, 17], 2),
        ([2, 16, 17, 18, 19], 2),
    ]
    assert [count for _, count in model_states.sliding(np.arange(8), 4, 2)] == [4, 2, 1]
    with pytest.raises(ValueError, match="stride = 5"):
        model_states.sliding(np.arange(9), 4, 5)


def test_without_a_first_token_the_first_of_a_text_is_not_asked_for():
    windows = model_states.sliding(np.arange(10, 19), 4, 2, repeat_first=False)
    assert [(list(tokens), count) for tokens, count in windows] == [
        ([10, 11, 12, 13, 14], 4),
        ([12, 13, 14, 15, 16], 2),
        ([14, 15, 16, 17, 18], 2),
    ]
    assert model_states.sliding(np.arange(1), 4, 2, repeat_first=False) == []


def test_a_continuation_without_context_begins_after_the_first_known_token(subject, without_first):
    for context, counts in (("", (3, 2)), ("The ", (3, 3))):
        asked = [model_states.continuation(s, context, "sea") for s in (subject, without_first)]
        assert tuple(request.queries for request in asked) == counts
        assert asked[0].tokens.tolist() == [2, *asked[1].tokens.tolist()]
    with pytest.raises(ValueError, match="text 0: 0 of 1"):
        model_states.states_of(
            without_first.model, [model_states.continuation(without_first, "", "a")]
        )


@pytest.mark.parametrize("length", [16, 100])
def test_scores_of_documents_are_those_of_adjacent_windows(subject, without_first, length):
    tokens = subject.tokens(TEXTS[0].text)[1:]
    after_first = [  # each window after <bos> alone
        -log_p(subject.model, [2, *tokens[start : start + length]])[0].sum()
        for start in range(0, 53, length)
    ]
    after_another = [  # each window after the token before it
        -log_p(subject.model, tokens[start : start + length + 1])[0].sum()
        for start in range(0, 52, length)
    ]
    for one, windows, count in ((subject, after_first, 53), (without_first, after_another, 52)):
        scores = model_quality.score_documents(one, TEXTS, length)
        assert scores.nats[0] == pytest.approx(np.sum(windows), rel=1e-5)
        assert scores.tokens.tolist() == [count, count - 45] and scores.bytes.tolist() == [53, 8]


def test_losses_of_documents_by_hand(subject, without_first):
    """All logits 0: every predicted byte takes log 300 nats; "a" alone has none to predict."""
    flat = nnx.merge(*nnx.split(subject.model))
    flat.embedding = nnx.Param(jnp.zeros_like(flat.embedding[...]))
    texts = [*TEXTS, Document("three", "novel", "a")]
    for one, counts in ((subject, [53, 8, 1]), (without_first, [52, 7, 0])):
        one = replace(one, model=flat)
        scores = model_quality.score_documents(one, texts, 16)
        assert scores.tokens.tolist() == counts and scores.tokens.dtype == int
        np.testing.assert_allclose(scores.nats, np.log(300) * np.asarray(counts), rtol=1e-6)
        states = model_states.document_states(one, TEXTS, 16, 8)
        assert np.bincount(states.documents).tolist() == counts[:2]
        outputs = model_quality.head_outputs(flat.head_rows(), states)
        other = model_quality.scores_of(outputs, states, TEXTS)
        np.testing.assert_allclose(other.nats, scores.nats[:2], rtol=1e-6)
    with pytest.raises(ValueError, match="1 documents"):
        model_quality.score_documents(one, texts[2:], 16)
    with pytest.raises(ValueError, match="'three'"):
        model_states.document_states(one, texts[2:], 16, 8)


def test_bits_per_byte_by_hand(subject):
    """All logits 0: a byte is one of 300 tokens, so it takes log2 300 bits."""
    flat = nnx.merge(*nnx.split(subject.model))
    flat.embedding = nnx.Param(jnp.zeros_like(flat.embedding[...]))
    states = model_states.document_states(replace(subject, model=flat), TEXTS, 16, 8)
    summary = model_quality.scores_of(
        model_quality.head_outputs(flat.embedding[...], states), states, TEXTS
    ).summary()
    assert summary["tokens"] == len(TEXTS[0].text) + len(TEXTS[1].text) == 61
    assert summary["bits_per_byte"] == pytest.approx(np.log2(300)) and summary[
        "perplexity"
    ] == pytest.approx(300)


def test_a_soft_cap_of_the_logits_by_hand():
    """Scores 4 and 0 with a cap of 2: logits 2 tanh(2) and 0."""
    rows, states = (
        jnp.asarray([[4.0], [0.0]]),
        model_states.States(np.ones((1, 1), np.float32), np.zeros(1, np.int32), np.zeros(1, int)),
    )
    expected = np.log1p(np.exp(-2 * np.tanh(2)))
    outputs = model_quality.head_outputs(rows, states, soft_cap=2.0)
    assert outputs.nats[0] == pytest.approx(expected, rel=1e-5)
    assert model_quality.loss(rows, states.hidden, states.targets, soft_cap=2.0)[
        0
    ] == pytest.approx(expected, rel=1e-5)
    assert outputs.nats[0] > model_quality.head_outputs(rows, states).nats[0]


def test_sliding_losses_are_those_of_the_windows(subject):
    states = model_states.document_states(subject, TEXTS, 16, 8)
    output = model_quality.head_outputs(subject.model.embedding[...], states, k=8)
    assert (
        states.targets[states.documents == 0].tolist() == subject.tokens(TEXTS[0].text)[1:].tolist()
    )
    tokens = subject.tokens(TEXTS[0].text)
    expected = [*log_p(subject.model, tokens[:17])[0]]
    for end in (*range(25, len(tokens), 8), len(tokens)):
        start, fresh = end - 16, min(8, (end - 17) % 8 or 8)
        expected += [*log_p(subject.model, [2, *tokens[start:end]])[0][-fresh:]]
    np.testing.assert_allclose(-output.nats[states.documents == 0], expected, atol=1e-4)
    scores = model_quality.scores_of(output, states, TEXTS)
    assert scores.tokens.tolist() == [53, 8] and scores.nats[0] == pytest.approx(
        -np.sum(expected), rel=1e-5
    )


def test_one_prefill_serves_dense_and_searched(subject, softmax):
    states = model_states.document_states(subject, TEXTS, 16, 8)
    rows = subject.model.embedding[...]
    exact, result = (
        model_quality.head_outputs(rows, states, k=8),
        model_quality.head_outputs(softmax, states, k=8),
    )
    np.testing.assert_array_equal(result.true_top.indices, softmax(states.hidden).indices)
    candidates = replace(softmax, k=softmax.candidates)(states.hidden).indices
    outside = [target not in some for target, some in zip(states.targets, candidates, strict=True)]
    np.testing.assert_array_equal(result.outside, outside)
    assert 0 < np.mean(outside) < 1 and not exact.outside.any()
    np.testing.assert_allclose(
        result.nats,
        -softmax.log_probabilities(states.hidden, states.targets[:, None])[:, 0],
        atol=1e-4,
    )
    every = model_quality.head_outputs(replace(softmax, candidates=300), states, k=8)
    np.testing.assert_allclose(every.nats, exact.nats, atol=1e-4)
    changed = model_quality.against(every, exact, states.documents)
    assert (
        changed["recall"]["mean"] == changed["agreement"]["mean"] == 1
        and changed["outside"]["mean"] == 0
    )
    assert abs(changed["variation"]["mean"]) < 1e-6 and abs(changed["loss"]["mean"]) < 1e-6
    worse = model_quality.against(result, exact, states.documents)
    assert (
        worse["outside"]["mean"] == pytest.approx(np.mean(outside)) and worse["recall"]["mean"] < 1
    )
    assert worse["variation"]["mean"] == pytest.approx(
        model_quality.total_variation(result.true_top, exact.true_top).mean()
    )


def test_differences_in_points_by_hand():
    output = intervals.points(
        [1.0, 1.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0], np.asarray(["a", "a", "b", "b"])
    )
    assert (output["mean"], output["n"], output["documents"]) == (0.5, 4, 2) and (
        output["low"],
        output["high"],
    ) == (0.5, 0.5)
    apart = intervals.points([1.0, 0.0], [0.0, 0.0])
    assert (apart["mean"], apart["low"], apart["high"]) == (0.5, 0.0, 1.0)


def test_a_cloze_by_hand():
    filler = "Now there was a long and quiet evening on the wide water of the bay. " * 3
    text = f"{filler}The captain had seen the whale. Nobody among us had yet seen that whale. "
    (result,) = questions.cloze(
        [Document("sea", "novel", text)], questions_per_document=4, sentences=5
    )
    assert (
        result["word"] == "whale"
        and result["context"].endswith("Nobody among us had yet seen that")
        and result["document"] == "sea"
    )
    assert not questions.cloze(
        [Document("sea", "novel", text.replace("seen that whale", "seen that ship"))]
    )  # not known from before
    assert not questions.cloze(
        [Document("sea", "novel", text.replace("Nobody", "No whale"))]
    )  # known from the last sentence alone
    assert len(questions.cloze([Document("sea", "novel", text * 7)], questions_per_document=2)) == 2


def requested(kind, *arguments):
    return [Instance(kind, {}, each, 0, ("task", place, 1)) for place, each in enumerate(arguments)]


def test_the_adapter_is_the_model(subject):
    lm = Harness(subject)
    pairs = [
        ("The sea", " is wide"),
        ("", "Ahab"),
        ("The sea", " is wide and deep"),
        ("Ahab", "bbbb"),
    ]
    output = lm.loglikelihood(requested("loglikelihood", *pairs))
    for (context, text), (likely, greedy) in zip(pairs, output, strict=True):
        tokens = subject.tokens(context + text)
        expected, best = log_p(subject.model, tokens)
        assert likely == pytest.approx(expected[-len(text) :].sum(), rel=1e-4)
        assert greedy == (best[-len(text) :].tolist() == tokens[-len(text) :].tolist())
    assert [greedy for _, greedy in output] == [
        False,
        False,
        False,
        True,
    ]  # what this toy writes after Ahab
    (rolled,) = lm.loglikelihood_rolling(requested("loglikelihood_rolling", (TEXTS[0].text,)))
    assert rolled == pytest.approx(
        log_p(subject.model, subject.tokens(TEXTS[0].text))[0].sum(), rel=1e-5
    )


def test_the_adapter_of_a_model_without_a_first_token(without_first):
    lm, model = Harness(without_first), without_first.model
    sea = without_first.tokens("The sea").tolist()
    assert (lm.prefix_token_id, lm.eot_token_id) == (0, 0)
    assert [lm.tok_encode("The sea", add) for add in (None, True, False)] == [sea] * 3
    pairs = [("The sea", " is wide"), ("", "The sea"), (" ", "The")]
    output = lm.loglikelihood(requested("loglikelihood", *pairs))
    # Without a context, the end of the text before is the context.
    for tokens, count, (likely, _) in zip(
        (without_first.tokens("The sea is wide"), [0, *sea], [0, *without_first.tokens(" The")]),
        (8, 7, 4),
        output,
        strict=True,
    ):
        expected, _ = log_p(model, np.asarray(tokens))
        assert likely == pytest.approx(expected[-count:].sum(), rel=1e-4)
    (rolled,) = lm.loglikelihood_rolling(requested("loglikelihood_rolling", ("The sea",)))
    assert rolled == pytest.approx(log_p(model, np.asarray([0, *sea]))[0].sum(), rel=1e-5)
    assert rolled == pytest.approx(output[1][0], rel=1e-5)
    tokens = np.asarray(hire.generate(model, [0], new_tokens=4))[1:].tolist()
    assert lm.generate_text("", dict(max_gen_toks=4)) == without_first.tokenizer.decode(tokens)
    endless = Harness(replace(without_first, end_tokens=()))
    for name in ("eot_token_id", "prefix_token_id"):
        with pytest.raises(ValueError, match="end_tokens"):
            getattr(endless, name)


def test_a_first_token_is_added_once(subject):
    tokenizer = train_tokenizer(["the sea the sea"], 280)
    lm = Harness(replace(subject, tokenizer=tokenizer))
    text = tokenizer.encode("sea").ids
    assert [lm.tok_encode("sea", add) for add in (None, True, False)] == [
        [2, *text], [2, *text], text,
    ]  # fmt: skip
    assert lm.tok_encode("<bos>sea") == [2, *text]
    assert lm.tok_encode("<bos>sea", add_special_tokens=True) == [2, 2, *text]
    assert lm.tok_encode("") == [2]


def test_text_ends_at_each_end_token(subject):
    prompt, sampling = subject.tokens("The sea"), dict(temperature=2.0, top_k=8)
    seed = request_seed(0, "The sea", 0)
    written = hire.generate(subject.model, prompt, new_tokens=12, seed=seed, **sampling)
    written = written[8:].tolist()
    end = next(token for token in written if token != written[0])
    expected = subject.tokenizer.decode(written[: written.index(end)])
    settings = sampling | dict(max_gen_toks=12)
    for end_tokens in ((end,), (299, end)):
        lm = Harness(replace(subject, end_tokens=end_tokens))
        assert lm.generate_text("The sea", settings) == expected
    lm = Harness(replace(subject, end_tokens=()))
    assert lm.generate_text("The sea", settings) == subject.tokenizer.decode(written)


@pytest.mark.parametrize(
    "settings, expected",
    [
        (dict(temperature=0.7), dict(temperature=0.7, top_k=300)),
        (dict(do_sample=True, temperature=1, top_k=8), dict(temperature=1.0, top_k=8)),
        (dict(do_sample=True, temperature=2.0, top_k=0), dict(temperature=2.0, top_k=300)),
        (dict(temperature=2.0, top_k=-1, top_p=0.9), dict(temperature=2.0, top_k=300, top_p=0.9)),
        (dict(temperature=1.5, min_p=0.5, top_k=20), dict(temperature=1.5, min_p=0.5, top_k=20)),
        (dict(repetition_penalty=1.5), dict(repetition_penalty=1.5)),
        (
            dict(temperature=1.0, top_k=20, presence_penalty=2, frequency_penalty=1.0),
            dict(temperature=1.0, top_k=20, presence_penalty=2.0, frequency_penalty=1.0),
        ),
        # Greedy by lm-eval's own rules, whatever else is stated.
        (dict(do_sample=False, temperature=1.0), {}),
        (dict(do_sample=False, top_k=1000, top_p=0.5, min_p=0.1, num_beams=1), {}),
        (dict(do_sample=None, temperature=None, top_p=0.95), {}),
    ],
)
def test_settings_are_those_of_generate(subject, settings, expected):
    lm = Harness(replace(subject, end_tokens=()))
    for seed in (0, 5):
        asked = settings | dict(max_gen_toks=6, seed=seed)
        texts = lm.generate_until(requested("generate_until", *[("The sea", asked)] * 2))
        for repeat, text in enumerate(texts):
            written = hire.generate(
                subject.model,
                subject.tokens("The sea"),
                new_tokens=6,
                seed=request_seed(seed, "The sea", repeat),
                **expected,
            )
            assert text == subject.tokenizer.decode(written[8:].tolist())


def test_sampling_repeats_from_run_to_run_and_differs_between_requests(subject, softmax):
    sampled = dict(do_sample=True, temperature=2.0, max_gen_toks=8)
    asked = [("The sea", sampled)] * 2 + [("A whale", sampled), ("The sea", sampled | dict(seed=1))]
    texts, again = (
        Harness(subject).generate_until(requested("generate_until", *asked)) for _ in range(2)
    )
    assert texts == again and len(set(texts)) == 4
    # Other requests change nothing, nor does a search that finds the same tokens.
    every = replace(softmax, k=300, candidates=300)
    assert Harness(subject, every).generate_text(*asked[2]) == texts[2]
    some, dense = Harness(subject, replace(softmax, candidates=300)), Harness(subject)
    few = sampled | dict(top_k=8)
    assert some.generate_text("The sea", few) == dense.generate_text("The sea", few)


@pytest.mark.parametrize("top_k", [None, 0, -1, 9, 300])
def test_a_search_samples_from_no_more_tokens_than_it_returns(subject, softmax, top_k):
    with pytest.raises(ValueError, match=f"top_k = {top_k or None}|top_k = None") as error:
        Harness(subject, softmax).generate_text("Ahab", dict(temperature=1.0, top_k=top_k))
    assert "8" in str(error.value) and "\n" not in str(error.value)


def test_greedy_text_ends_at_the_stop_text(subject, softmax):
    tokens = np.asarray(hire.generate(subject.model, subject.tokens("Ahab")[None], new_tokens=4))[0]
    asked = (
        dict(max_gen_toks=4, until=["never"]),
        dict(max_gen_toks=4, until="b"),
        dict(until=["bbb"]),
    )
    written = Harness(subject).generate_until(
        requested("generate_until", *(("Ahab", settings) for settings in asked))
    )
    assert (
        written == [subject.tokenizer.decode(tokens[5:].tolist()), "", ""] and written[0] == "bbbb"
    )
    every = replace(softmax, candidates=300)
    assert Harness(subject, every).generate_text("Ahab", asked[0]) == "bbbb"


@pytest.mark.parametrize(
    "settings, value",
    [
        (dict(do_sample=True), "do_sample = True.*0.0"),
        (dict(do_sample=True, temperature=0), "do_sample = True.*0"),
        (dict(do_sample="yes"), "do_sample = 'yes'"),
        (dict(temperature=-0.5), "temperature = -0.5"),
        (dict(temperature=float("nan")), "temperature = nan"),
        (dict(temperature=float("inf")), "temperature = inf"),
        (dict(temperature="hot"), "temperature = 'hot'"),
        (dict(temperature=1.0, top_p=1.5), "top_p = 1.5"),
        (dict(temperature=1.0, top_p="0.9"), "top_p = '0.9'"),
        (dict(temperature=1.0, min_p=-0.1), "min_p = -0.1"),
        (dict(temperature=1.0, top_k=301), "top_k = 301"),
        (dict(temperature=1.0, top_k=2.5), "top_k = 2.5"),
        (dict(temperature=1.0, seed=0.5), "seed = 0.5"),
        (dict(repetition_penalty=0.0), "repetition.* = 0"),
        (dict(num_beams=4), "num_beams = 4"),
        (dict(max_tokns=3), "'max_tokns' = 3"),
        (dict(max_length=30), "'max_length' = 30"),
        (dict(max_gen_toks=0), "max_gen_toks = 0"),
        (dict(max_gen_toks=2.5), "max_gen_toks = 2.5"),
        (dict(max_gen_toks=4, max_new_tokens=8), "max_gen_toks = 4 and max_new_tokens = 8"),
        (dict(until=["a", 3]), r"until = \['a', 3\]"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(subject, settings, value):
    with pytest.raises(ValueError, match=value) as error:
        Harness(subject).generate_until(
            requested("generate_until", ("Ahab", dict(until=["x"]) | settings))
        )
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", LENGTHS)
def test_every_name_of_a_length_is_honoured(subject, name):
    greedy = dict(do_sample=False, temperature=0.0, until="")
    assert Harness(subject).generate_text("Ahab", greedy | {name: 3}) == "bbb"


def test_searched_harnesses_share_a_prefill(subject, softmax, monkeypatch):
    kept = {}
    pairs = requested("loglikelihood", ("The sea", " is wide"), ("Whales", " blow"))
    Harness(subject, None, kept).loglikelihood(pairs)
    monkeypatch.setattr(
        "hire.lab.metrics.lm_eval_model.states_of", lambda *_: pytest.fail("computed twice")
    )
    (likely, _), _ = Harness(subject, softmax, kept).loglikelihood(pairs)
    monkeypatch.undo()
    converted = replace(subject, model=hire.convert(subject.model, softmax=softmax))
    assert Harness(converted).loglikelihood(pairs)[0][0] == pytest.approx(likely, abs=1e-5)
    states = model_states.states_of(
        subject.model, [model_states.continuation(subject, "The sea", " is wide")]
    )
    assert likely == pytest.approx(
        float(softmax.log_probabilities(states.hidden, states.targets[:, None]).sum()), abs=1e-3
    )


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """Writes a wheel of PyPI's evals that holds these rows of QuaRTz, where it is looked for."""
    monkeypatch.setenv("HIRE_CACHE", str(tmp_path))

    def write(*rows):
        path = tmp_path / "evals" / questions.WHEEL
        path.parent.mkdir(exist_ok=True)
        with zipfile.ZipFile(path, "w") as file:
            for name in questions.SETS.values():
                file.writestr(f"evals/registry/data/{name}", "\n".join(map(json.dumps, rows)))
        monkeypatch.setattr(questions, "WHEEL_SHA256", digest(path))

    return write


def question(text="The sea is\n\n A: wet\n B: dry", ideal="A"):
    return dict(
        input=[dict(role="system", content="Choose."), dict(role="user", content=text)], ideal=ideal
    )


def test_a_local_task_is_what_the_harness_makes_of_it(subject, softmax, wheel):
    wheel(
        question(),
        question("Fire is\nA. A.cold\nB. hot\nAnswer:", "B"),
        question("Ice?\n\na) warm\nb) cold\nc) hot", "b) cold"),
    )
    result, failed = lm_eval_tasks.run_tasks(
        subject,
        {"dense": None, "HiRE": softmax},
        ["local_quartz", "nothing", "local_cloze"],
        limit=3,
    )
    assert list(result) == ["local_quartz"] and list(failed) == ["nothing", "local_cloze"]
    assert "nothing" in failed["nothing"]
    assert "local_cloze" in failed["local_cloze"] and "512" in failed["local_cloze"]
    output = result["local_quartz"]["dense"]
    right = []
    for text, choices, gold in (
        ("The sea is", "wet dry", 0),
        ("Fire is", "cold hot", 1),
        ("Ice?", "warm cold hot", 1),
    ):
        asked = [f"{text}\nAnswer:", *choices.split()]
        sums = [
            log_p(subject.model, subject.tokens(f"{asked[0]} {each}"))[0][-len(each) - 1 :].sum()
            for each in asked[1:]
        ]
        right.append(float(np.argmax(sums) == gold))
    assert output["right"] == right and output["documents"] == ["0", "1", "2"]
    assert output["metrics"]["local_quartz"]["acc,none"] == pytest.approx(np.mean(right))
    assert output["data"] == "quartz/samples.jsonl of PyPI evals==3.0.1.post1"
    apart = lm_eval_tasks.pooled([result["local_quartz"]["HiRE"]], [output])
    assert apart["n"] == 3 and apart["mean"] == pytest.approx(
        np.mean(result["local_quartz"]["HiRE"]["right"]) - np.mean(right)
    )


@pytest.mark.parametrize(
    "row, value",
    [
        (dict(question="The sea is", ideal="A"), "question 1"),
        (question("", "A"), "question 1.*'A'"),
        (question("The sea is wet", "A"), "question 1.*'A'"),
        (question(ideal="C"), "question 1.*'C'"),
        (question("x" * 600 + "\nA. wet\nB. dry"), "613"),
    ],
)
def test_bad_data_is_one_line_that_names_the_task(subject, wheel, row, value):
    wheel(question(), row)
    with pytest.raises(ValueError, match=f"local_quartz.*{value}") as error:
        lm_eval_tasks.run_task(Harness(subject), "local_quartz")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "call, value",
    [
        (lambda s: model_states.document_states(s, [replace(TEXTS[0], text="")], 16, 8), "one"),
        (lambda s: model_states.document_states(s, TEXTS, 1024, 8), "1024"),
        (lambda s: Harness(s).loglikelihood(requested("loglikelihood", ("a", ""))), "request 0"),
        (
            lambda s: Harness(s).loglikelihood_rolling(requested("loglikelihood_rolling", ("",))),
            "request 0",
        ),
        (lambda s: Harness(s).loglikelihood(requested("loglikelihood", ("a" * 600, "b"))), "602"),
        (lambda s: Harness(s).generate_text("a" * 500, {}), "501 .* 256"),
    ],
)
def test_bad_text_is_named(subject, call, value):
    with pytest.raises(ValueError, match=value):
        call(subject)


def test_a_data_set_out_of_reach_is_one_line(subject, monkeypatch, tmp_path):
    monkeypatch.setenv("HIRE_CACHE", str(tmp_path))
    monkeypatch.setattr(questions, "EVALS", "/no/such/place.whl")
    with pytest.raises(ValueError, match="local_quartz.*/no/such/place.whl") as error:
        lm_eval_tasks.run_task(Harness(subject), "local_quartz")
    assert "\n" not in str(error.value)


def test_mean_bound_by_hand():
    # Wilson's bound for 90 of 100 at one-sided 97.5 % (z = 1.96) is 0.8256; for 100 of 100 it is n
    # / (n + z^2).
    assert intervals.mean_bound(np.repeat([1.0, 0.0], [90, 10]), None, 0.975) == pytest.approx(
        0.826, abs=1.5e-3
    )
    assert intervals.mean_bound(np.ones(100), None, 0.975) == pytest.approx(
        100 / (100 + 1.96**2), abs=1e-4
    )


def test_one_document_bounds_nothing():
    with pytest.raises(ValueError, match="1 document"):
        intervals.mean_bound(np.ones(50), ["only"] * 50)


def test_mean_bound_counts_documents_when_their_values_are_alike():
    alike = np.repeat([1.0, 0.0], [90, 10])
    documents = np.repeat(
        np.arange(10), 10
    )  # nine documents all right, one all wrong: ten facts, not a hundred
    assert intervals.mean_bound(alike, documents) < intervals.mean_bound(alike) - 0.05


def test_mean_bound_covers_at_least_as_often_as_it_says(rng):
    """Over documents whose values are alike, the bound lies below the truth about 95 times
    in 100.
    """
    below = 0
    for _ in range(400):
        skill = rng.beta(20, 2, size=60)
        values = rng.random((60, 20)) < skill[:, None]
        below += (
            intervals.mean_bound(values.reshape(-1).astype(float), np.repeat(np.arange(60), 20))
            <= 20 / 22
        )
    assert below / 400 >= 0.92
