"""The real model, on real text: weights straight from the file, tokenizer against SentencePiece,
recall on its softmax.
"""

import re
import warnings
from dataclasses import replace

import gguf
import numpy as np
import pytest

import hire
from hire.lab.data import model_states
from hire.lab.data.text import documents
from hire.lab.metrics import model_quality, numpy_decoder, search_recall
from hire.lab.paths import ROOT
from hire.models.loading import find_weights
from hire.tuning import candidates_needed, true_top_k


@pytest.fixture(scope="module")
def file(gemma):
    return gguf.GGUFReader(find_weights("gemma3_270m"))


def test_the_file_states_its_first_and_end_tokens(gemma):
    assert gemma.first_token == 2 and gemma.end_tokens == (1,)  # <bos>, <eos>


def test_losses_are_those_of_plain_numpy_on_the_file_itself(gemma, file):
    tensors = {tensor.name: tensor for tensor in file.tensors}
    unpacked = {}

    def weight(name):
        if name not in unpacked:
            tensor = tensors[name]
            unpacked[name] = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        return unpacked[name]

    tokens, names = model_states.windows(gemma, documents("evaluation", ["speech"])[-1:], 96)
    ours = model_quality.losses(
        gemma.model, model_states.collect(gemma.model, tokens, names, skip=0)
    )
    theirs = numpy_decoder.losses(tokens[0], weight, gemma.model.config)
    np.testing.assert_allclose(ours, theirs, atol=2e-3)
    assert 8 < np.exp(ours.mean()) < 40  # a language model, on a modern speech


def test_the_tokenizer_is_sentencepiece_on_the_whole_corpus(gemma, file):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # protobuf's own deprecations
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2

    pieces, scores, kinds = (
        file.fields[f"tokenizer.ggml.{part}"].contents()
        for part in ("tokens", "scores", "token_type")
    )
    proto = sentencepiece_model_pb2.ModelProto()
    for piece, score, kind in zip(pieces, scores, kinds, strict=True):
        kind = 2 if piece == "<unk>" else kind
        proto.pieces.add(
            piece=piece.replace(" ", "\u2581") if kind == 4 else piece, score=score, type=kind
        )
    proto.trainer_spec.model_type, proto.trainer_spec.byte_fallback = 2, True
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    trainer.pad_id, trainer.eos_id, trainer.bos_id, trainer.unk_id = 0, 1, 2, 3
    normalizer.name, normalizer.add_dummy_prefix, normalizer.remove_extra_whitespaces = (
        "identity",
        False,
        False,
    )
    peer = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())

    hard = [
        "  a  b\n\n\nc\t\td <table> x</table>",
        "naïve \U0001d539 \x00 ☃ é",
        "<bos> is text here",
        "",
        "日本語 🏳️‍🌈",
    ]
    for split in ("train", "calibration", "evaluation"):
        texts = [document.text for document in documents(split)] + hard
        encoded = gemma.tokenizer.encode_batch(texts, add_special_tokens=False)
        decoded = gemma.tokenizer.decode_batch(
            [text.ids for text in encoded], skip_special_tokens=False
        )
        assert decoded == texts
        compared = slice(0, None, 4 if split == "train" else 1)  # the peer is slower
        assert [text.ids for text in encoded[compared]] == peer.encode(texts[compared])


@pytest.fixture(scope="module")
def softmax(gemma):
    """A search by a low-rank estimator that is fitted to text, as in the README."""
    rows = gemma.model.embedding[...]
    seen = model_states.collect(
        gemma.model, *model_states.windows(gemma, documents("calibration")[:16], 96), skip=4
    )
    return hire.HireSoftmax(
        rows, hire.LowRank.fit(rows, 160, calibration=seen.hidden, bits=8), k=32, candidates=2048
    )


def test_the_readme_writes_text_with_the_searched_model(gemma, softmax, monkeypatch):
    _, code, *_ = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    monkeypatch.setattr("hire.models.load", lambda name: gemma)
    given = dict(
        hire=hire, softmax=replace(softmax, candidates=2**14)
    )  # so many that all forty tokens are the dense ones
    exec(code, given)
    dense = hire.generate(gemma.model, gemma.tokens("Call me Ishmael.")[None], new_tokens=40)
    assert (given["tokens"] == dense).all()


def test_a_small_fitted_estimator_nominates_the_top_tokens(gemma, softmax):
    unseen = model_states.collect(
        gemma.model,
        *model_states.windows(gemma, documents("evaluation", ["novel"])[:6], 32),
        skip=12,
    )
    best = true_top_k(softmax.rows, unseen.hidden, 32)
    judged = search_recall.judge(softmax, unseen, best)
    assert softmax.bytes_read() <= 0.08 * softmax.rows.nbytes
    assert judged["recall"]["mean"] >= 0.97 and judged["top1"]["mean"] >= 0.98
    plain = candidates_needed(
        hire.LowRank.fit(softmax.rows, 160, bits=8), unseen.hidden, best.indices
    )
    assert (
        np.mean(plain <= 2048) < judged["recall"]["mean"] - 0.02
    )  # fitting is what makes low rank work
