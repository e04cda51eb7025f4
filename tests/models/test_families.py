"""Every family of models against plain numpy on the file itself, and what files state of
themselves.
"""

import dataclasses
import json

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from model_files import (
    CONFIGS,
    FACTORS,
    VOCABULARY,
    hub_names,
    searches_of,
    write_folder,
    write_gguf,
)

import hire
from hire.lab.metrics import numpy_decoder
from hire.models import load
from hire.models.config import llama3_rope_factors

# By hand: 8 rotary frequencies of base 100; the wavelengths are 2 pi 100^(i/8).
LLAMA3 = dict(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)


def metadata_of(family):
    """What a GGUF of the family states."""
    config = CONFIGS[family]
    metadata = {
        "embedding_length": 64,
        "block_count": 2,
        "feed_forward_length": 128,
        "context_length": 512,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": config.norm_epsilon,
        "rope.freq_base": config.rope_base,
    }
    metadata |= {
        "gemma2": {
            "attention.sliding_window": 16,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
            "attention.scale": 0.125,
        },
        "gemma3": {
            "attention.sliding_window": 16,
            "attention.sliding_window_pattern": [True, False],
            "rope.freq_base_swa": 1e4,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
        "llama": {"rope.dimension_count": 16, "vocab_size": 300},
        "qwen2": {},
        "qwen3": {"attention.key_length": 24, "attention.value_length": 24},
    }[family]
    result = {f"{family}.{key}": value for key, value in metadata.items()}
    return result | {"tokenizer.ggml.model": "llama", "tokenizer.ggml.bos_token_id": 2}


def fields_of(family):
    """What transformers writes for a model of the family, in short: not what it assumes."""
    fields = dict(
        vocab_size=300,
        hidden_size=64,
        num_hidden_layers=2,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rms_norm_eps=CONFIGS[family].norm_epsilon,
    )
    gemma = dict(head_dim=16, query_pre_attn_scalar=16, sliding_window=16)
    return (
        fields
        | {
            "gemma2": gemma
            | dict(
                model_type="gemma2",
                query_pre_attn_scalar=64,
                attn_logit_softcapping=5.0,
                final_logit_softcapping=3.0,
            ),
            "gemma3": gemma
            | dict(
                model_type="gemma3_text",
                sliding_window_pattern=2,
                rope_scaling=dict(rope_type="linear", factor=8.0),
            ),
            "llama": dict(
                model_type="llama",
                hidden_act="silu",
                rope_theta=100.0,
                rope_scaling=dict(rope_type="llama3", **LLAMA3),
            ),
            "qwen2": dict(
                model_type="qwen2",
                hidden_act="silu",
                rope_theta=1e6,
                tie_word_embeddings=True,
                use_sliding_window=False,
                max_window_layers=21,
                sliding_window=32,
            ),
            "qwen3": dict(
                model_type="qwen3",
                hidden_act="silu",
                head_dim=24,
                rope_parameters=dict(rope_type="default", rope_theta=1e6),
                tie_word_embeddings=True,
                attention_bias=False,
                layer_types=["full_attention"] * 2,
            ),
        }[family]
    )


def random_arrays(family):
    """Random weights by their names in a GGUF, half-split: what Hugging Face files hold."""
    config, rng = CONFIGS[family], np.random.default_rng(7)
    d, f, e = 64, 128, config.head_width
    shapes = {"token_embd.weight": (300, d), "output_norm.weight": (d,)}
    if not config.tied:
        shapes["output.weight"] = (300, d)
    for layer in range(2):
        parts = {
            "attn_q.weight": (4 * e, d),
            "attn_k.weight": (2 * e, d),
            "attn_v.weight": (2 * e, d),
            "attn_output.weight": (d, 4 * e),
            "ffn_gate.weight": (f, d),
            "ffn_up.weight": (f, d),
            "ffn_down.weight": (d, f),
            "attn_norm.weight": (d,),
            "ffn_norm.weight": (d,),
        }
        if family.startswith("gemma"):
            parts |= {"post_attention_norm.weight": (d,), "post_ffw_norm.weight": (d,)}
        if family in ("gemma3", "qwen3"):
            parts |= {"attn_q_norm.weight": (e,), "attn_k_norm.weight": (e,)}
        if family == "qwen2":
            parts |= {"attn_q.bias": (4 * e,), "attn_k.bias": (2 * e,), "attn_v.bias": (2 * e,)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in parts.items()}
    return {
        name: (
            1 + rng.normal(size=shape) / 4
            if "norm" in name
            else rng.normal(size=shape) / np.sqrt(shape[-1])
        ).astype(np.float32)
        for name, shape in shapes.items()
    }


def in_gguf(family, arrays):
    """The weights as a GGUF of the family holds them, the scaled frequencies of Llama with them."""
    if family != "llama":
        return arrays
    result = arrays | {"rope_freqs.weight": np.asarray(FACTORS, np.float32)}
    for name in result:
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            halves = result[name].reshape(-1, 2, 8, 64)  # head, half, frequency, column
            result[name] = halves.swapaxes(1, 2).reshape(-1, 64)
    return result


@pytest.fixture(scope="module", params=list(CONFIGS))
def family(request):
    return request.param


@pytest.fixture(scope="module")
def file(family, tmp_path_factory):
    path = tmp_path_factory.mktemp(family) / f"{family}.gguf"
    arrays = in_gguf(family, random_arrays(family))
    return write_gguf(path, arrays, metadata_of(family), architecture=family)


@pytest.fixture(scope="module")
def subject(file):
    return load(file)


def assert_same_config(one, other):
    """A GGUF holds the divisors of rotary frequencies in 32 bits."""
    assert one.rope_factors == pytest.approx(other.rope_factors, rel=1e-6)
    assert dataclasses.replace(one, rope_factors=other.rope_factors) == other


def reference(file, family):
    """Weights by name, as numpy reads them from the file."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}

    def weight(name):
        return gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type)

    return weight, dict(config=CONFIGS[family])


def test_llama3_divisors_by_hand():
    # Wavelengths 2 pi and 2 pi 100: 64 holds 10.2 periods, more than 4, and 0.1, fewer than 1.
    factors = llama3_rope_factors(
        4, 1e4, factor=8, low_freq_factor=1, high_freq_factor=4, original_context=64
    )
    assert factors == pytest.approx((1.0, 8.0))
    # Two periods are a third of the way from 1 to 4: the frequency is 1/3 + 2/3 / 8 of its own.
    (_, half) = llama3_rope_factors(
        4,
        (32 / 2 / np.pi) ** 2,
        factor=8,
        low_freq_factor=1,
        high_freq_factor=4,
        original_context=64,
    )
    assert half == pytest.approx(1 / (1 / 3 + 2 / 3 / 8))


def test_the_file_states_its_configuration(subject, family):
    stated, expected = subject.model.config, CONFIGS[family]
    assert_same_config(stated, expected)
    assert subject.first_token == 2 and subject.weights_precision == "ALL_F32 weights"


def test_hidden_states_and_logits_are_those_of_plain_numpy(subject, file, family, rng):
    weight, how = reference(file, family)
    tokens = rng.integers(3, 300, (2, 40))  # windows of 16 no longer see the beginning
    hidden, _ = subject.model.prefill(jnp.asarray(tokens, jnp.int32))
    logits = subject.model.logits(hidden)
    for text, ours, scores in zip(tokens, hidden, logits, strict=True):
        theirs = numpy_decoder.hidden_states(text, weight, **how, interleaved=family == "llama")
        np.testing.assert_allclose(ours, theirs, atol=2e-4)
        np.testing.assert_allclose(scores, numpy_decoder.logits(theirs, weight, **how), atol=2e-3)


def test_it_writes_what_plain_numpy_writes(subject, file, family, rng):
    weight, how = reference(file, family)
    text = rng.integers(3, 300, 20)
    written = hire.generate(subject.model, text, new_tokens=12)
    for length in range(20, 32):
        hidden = numpy_decoder.hidden_states(
            np.asarray(written[:length]), weight, **how, interleaved=family == "llama"
        )
        scores = numpy_decoder.logits(hidden[-1:], weight, **how)[0]
        assert scores[written[length]] >= scores.max() - 1e-3


def test_a_folder_of_the_same_weights_is_the_same_model(subject, family, tmp_path, rng):
    tensors = hub_names(random_arrays(family), gemma=family.startswith("gemma"))
    folder = write_folder(tmp_path / "model", tensors, fields_of(family))
    loaded, tokens = load(folder), jnp.asarray(rng.integers(3, 300, (1, 24)), jnp.int32)
    assert_same_config(loaded.model.config, subject.model.config)
    np.testing.assert_allclose(
        loaded.model.prefill(tokens)[0], subject.model.prefill(tokens)[0], atol=1e-4
    )


def test_a_converted_model_of_every_family_writes_the_same(subject, rng):
    model = subject.model
    softmax, ffns = searches_of(model, candidates=64)
    fast = hire.convert(model, softmax=softmax, ffn=ffns)
    tokens = jnp.asarray(rng.integers(3, 300, (2, 9)), jnp.int32)
    dense = hire.generate(model, tokens, new_tokens=12)
    assert hire.generate(fast, tokens, new_tokens=12).tolist() == dense.tolist()
    hidden = model.prefill(tokens)[0][:, -1]
    top, found = model.top_tokens(hidden, 4), fast.top_tokens(hidden, 4)
    assert found.indices.tolist() == top.indices.tolist()
    np.testing.assert_allclose(found.values, top.values, atol=1e-4)
    exact = jnp.log(jnp.sum(jnp.exp(model.logits(hidden)), axis=1))
    normalizer = softmax.top_k_with_normalizer(hidden)
    np.testing.assert_allclose(normalizer.log_normalizer, exact, atol=2e-2)
    with pytest.raises(ValueError, match="soft_cap"):
        hire.convert(model, softmax=dataclasses.replace(softmax, soft_cap=7.0))
    other = "silu" if model.config.ffn_activation == "gelu_tanh" else "gelu_tanh"
    with pytest.raises(ValueError, match=other):
        hire.convert(model, ffn=[dataclasses.replace(ffn, activation=other) for ffn in ffns])


@pytest.mark.parametrize(
    "family, key, value",
    [
        ("llama", "general.architecture", "mamba"),
        ("llama", "llama.rope.scaling.type", "yarn"),
        ("llama", "llama.expert_count", 8),
        ("llama", "llama.rope.dimension_count", 8),
        ("llama", "llama.attention.sliding_window", 128),
        ("llama", "llama.attention.something_new", 1),
        ("llama", "llama.attention.head_count", 3),
        ("llama", "llama.attention.head_count_kv", 3),
        ("llama", "llama.block_count", 0),
        ("llama", "llama.vocab_size", 299),
        ("qwen2", "qwen2.embedding_length", 32),
        ("qwen2", "qwen2.feed_forward_length", 64),
        ("qwen2", "qwen2.attention.layer_norm_rms_epsilon", None),
        ("qwen3", "qwen3.attention.value_length", 16),
        ("gemma3", "gemma3.attention.sliding_window", None),
        ("gemma3", "gemma3.attention.sliding_window_pattern", [False, True]),
        ("gemma3", "gemma3.attention.causal", False),
        ("gemma2", "gemma2.rope.scaling.factor", 8.0),
        ("gemma2", "gemma2.final_logit_softcapping", -1.0),
    ],
)
def test_metadata_that_cannot_be_honoured_is_named(tmp_path, family, key, value):
    architecture, metadata = family, metadata_of(family) | {key: value}
    if key == "general.architecture":
        architecture, metadata = value, metadata_of(family)
    arrays = in_gguf(family, random_arrays(family))
    path = write_gguf(tmp_path / "other.gguf", arrays, metadata, architecture=architecture)
    with pytest.raises(ValueError) as error:
        load(path)
    message = str(error.value)
    assert "other.gguf" in message and "\n" not in message and "expected" in message


@pytest.mark.parametrize(
    "family, field, value",
    [
        ("llama", "model_type", "mamba"),
        ("llama", "model_type", None),
        ("llama", "rope_scaling", dict(rope_type="yarn", factor=4.0)),
        ("llama", "rope_scaling", dict(rope_type="llama3", factor=8.0)),
        ("llama", "rope_scaling", "linear"),
        ("llama", "hidden_act", "gelu"),
        ("llama", "attention_bias", True),
        ("llama", "mlp_bias", True),
        ("llama", "hidden_size", None),
        ("llama", "num_hidden_layers", 2.5),
        ("llama", "quantization_config", dict(bits=4)),
        ("qwen2", "use_sliding_window", True),
        ("qwen3", "layer_types", ["full_attention", "sliding_attention"]),
        ("gemma3", "layer_types", ["full_attention", "sliding_attention"]),
        ("gemma3", "use_bidirectional_attention", True),
        ("gemma3", "hidden_activation", "relu"),
        ("gemma3", "query_pre_attn_scalar", 0),
    ],
)
def test_fields_that_cannot_be_honoured_are_named(tmp_path, family, field, value):
    tensors = hub_names(random_arrays(family), gemma=family.startswith("gemma"))
    folder = write_folder(tmp_path / "other", tensors, fields_of(family) | {field: value})
    with pytest.raises(ValueError, match="config.json") as error:
        load(folder)
    message, inner = str(error.value), list(value) if isinstance(value, dict) else []
    assert "\n" not in message
    assert any(name in message for name in (field, "architecture", "freq_factor", *inner))


def test_weights_that_contradict_the_metadata_are_named(tmp_path):
    tensors = hub_names(random_arrays("qwen2"), gemma=False)
    for name, number in (("tied", 0), ("more", 1)):
        fields = fields_of("qwen2") | dict(tie_word_embeddings=number == 1)
        more = {"model.layers.0.self_attn.o_proj.bias": np.zeros(64, np.float32)} if number else {}
        folder = write_folder(tmp_path / name, tensors | more, fields)
        with pytest.raises(ValueError, match="o_proj.bias" if number else "lm_head.weight"):
            load(folder)
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"] * 2}
    with pytest.raises(ValueError, match="lm_head.weight"):
        load(write_folder(tmp_path / "untied", tensors | head, fields_of("qwen2")))
    same = {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    folder = write_folder(tmp_path / "twice", tensors | same, fields_of("qwen2"))
    assert load(folder).model.untied_head is None


def test_a_folder_may_be_in_several_files(tmp_path, subject, family, rng):
    tensors = hub_names(random_arrays(family), gemma=family.startswith("gemma"))
    names = sorted(tensors)
    folder = write_folder(
        tmp_path / "model", {name: tensors[name] for name in names[::2]}, fields_of(family)
    )
    from safetensors.numpy import save_file

    save_file({name: tensors[name] for name in names[1::2]}, folder / "second.safetensors")
    tokens = jnp.asarray(rng.integers(3, 300, (1, 8)), jnp.int32)
    np.testing.assert_allclose(
        load(folder).model.prefill(tokens)[0], subject.model.prefill(tokens)[0], atol=1e-4
    )
    text_config = json.loads((folder / "config.json").read_text())
    if family == "gemma3":  # a model of text and images states its text model within
        (folder / "config.json").write_text(
            json.dumps(dict(model_type="gemma3", text_config=text_config))
        )
        assert load(folder).model.config == subject.model.config


@pytest.mark.parametrize(
    "stated, expected", [({}, ()), (dict(eos=7), (7,)), (dict(eot=9, eos=7, eom=7), (7, 9))]
)
def test_a_gguf_states_its_end_tokens(tmp_path, monkeypatch, stated, expected):
    monkeypatch.setenv("HIRE_CACHE", str(tmp_path / "cache"))
    keys = {f"tokenizer.ggml.{name}_token_id": token for name, token in stated.items()}
    arrays = in_gguf("llama", random_arrays("llama"))
    metadata = metadata_of("llama") | keys
    path = write_gguf(tmp_path / "end.gguf", arrays, metadata, architecture="llama")
    for _ in range(2):  # from the file, and from the cache
        assert load(path).end_tokens == expected


@pytest.mark.parametrize(
    "config, generation, expected",
    [
        ({}, None, (2,)),  # what transformers assumes for a Llama
        (dict(eos_token_id=None), None, (2,)),
        (dict(eos_token_id=8), {}, (8,)),
        (dict(eos_token_id=[8, 5]), dict(eos_token_id=None), (8, 5)),
        (dict(eos_token_id=8), dict(eos_token_id=[9, 8, 9]), (9, 8)),
    ],
)
def test_a_folder_states_its_end_tokens(tmp_path, config, generation, expected):
    tensors = hub_names(random_arrays("llama"), gemma=False)
    folder = write_folder(tmp_path / "model", tensors, fields_of("llama") | config)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    assert load(folder).end_tokens == expected


@pytest.mark.parametrize("family, expected", [("gemma3", (1,)), ("qwen3", ())])
def test_families_differ_in_the_end_token_of_a_silent_folder(tmp_path, family, expected):
    tensors = hub_names(random_arrays(family), gemma=family == "gemma3")
    fields = fields_of(family)
    assert load(write_folder(tmp_path / "model", tensors, fields)).end_tokens == expected
    nested = dict(model_type=fields["model_type"], text_config=fields, eos_token_id=[6, 4])
    assert load(write_folder(tmp_path / "nested", tensors, nested)).end_tokens == (6, 4)


@pytest.mark.parametrize("token", [-1, 300, 2.0, True, "<eos>", [2, 300], dict(id=2)])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_an_end_token_that_is_none_is_named(tmp_path, file, token):
    stated = dict(eos_token_id=token)
    fields = fields_of("llama") | (stated if file == "config.json" else {})
    folder = write_folder(
        tmp_path / "other", hub_names(random_arrays("llama"), gemma=False), fields
    )
    if file == "generation_config.json":
        (folder / file).write_text(json.dumps(stated))
    with pytest.raises(ValueError, match=f"/{file}: eos_token_id") as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_an_end_token_beyond_the_pieces_of_a_gguf_is_named(tmp_path):
    metadata = metadata_of("llama") | {"tokenizer.ggml.eot_token_id": 299}
    arrays = in_gguf("llama", random_arrays("llama"))
    path = write_gguf(tmp_path / "other.gguf", arrays, metadata, architecture="llama")
    with pytest.raises(ValueError, match="other.gguf.*eot_token_id = 299") as error:
        load(path)
    assert "\n" not in str(error.value)


def test_a_source_that_is_not_there_is_named(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("Name or service not known\nmore")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match="somebody/some-model.*Name or service not known"):
        load("somebody/some-model")
    for source in (tmp_path / "nothing.gguf", "nothing", "./no/folder"):
        with pytest.raises(FileNotFoundError, match="no such file"):
            load(source)
    with pytest.raises(FileNotFoundError, match="paper_1b: no published weights"):
        load("paper_1b")


def test_vocabulary_may_be_padded(tmp_path):
    lists = {name: values[:290] for name, values in VOCABULARY.items()}
    path = write_gguf(
        tmp_path / "padded.gguf",
        random_arrays("qwen2"),
        metadata_of("qwen2"),
        architecture="qwen2",
        lists=lists,
    )
    assert load(path).model.config.vocabulary == 300


def test_a_padding_row_is_never_written_under_the_mask_of_the_tokenizer(tmp_path, rng):
    arrays = random_arrays("qwen2")
    rows = arrays["token_embd.weight"]
    rows[[295, 296]] = 50 * np.stack([rows[3], -rows[3]])  # one of them wins nearly always
    path = write_gguf(tmp_path / "padded.gguf", arrays, metadata_of("qwen2"), architecture="qwen2")
    text_model = load(path)
    mask, num_known = text_model.token_mask, len(VOCABULARY["tokens"])
    assert mask.dtype == bool and np.flatnonzero(mask).tolist() == list(range(num_known))
    model, tokens = text_model.model, jnp.asarray(rng.integers(3, num_known, (2, 5)), jnp.int32)
    rows = model.head_rows()
    softmax = hire.HireSoftmax(rows, hire.Quantized.fit(rows, 8), k=4, candidates=64)
    for one in (model, hire.convert(model, softmax=softmax)):
        assert (hire.generate(one, tokens, new_tokens=6)[:, 5:] >= num_known).any()
        assert (hire.generate(one, tokens, new_tokens=6, mask=mask) < num_known).all()


def test_masks_and_penalties_of_a_text_are_honoured_dense_and_searched(subject, rng):
    model = subject.model
    rows = model.head_rows()
    softmax = hire.HireSoftmax(
        rows, hire.Quantized.fit(rows, 8), k=8, candidates=64, soft_cap=model.config.logit_soft_cap
    )
    fast = hire.convert(model, softmax=softmax)
    tokens = jnp.asarray(rng.integers(3, 300, (2, 9)), jnp.int32)
    mask = jnp.arange(300) % 2 == 0
    settings = dict(
        new_tokens=10, mask=mask, logit_bias=jnp.zeros(300).at[4].set(-jnp.inf),
        repetition_penalty=1.2, presence_penalty=jnp.asarray([0.5, 100.0]),
    )  # fmt: skip
    dense = hire.generate(model, tokens, **settings)
    assert hire.generate(fast, tokens, **settings).tolist() == dense.tolist()
    new = np.asarray(dense[:, 9:])
    assert (new % 2 == 0).all() and 4 not in new
    # The second text has a penalty that no logit outweighs: no token comes again.
    assert len(set(dense[1].tolist())) == len(set(tokens[1].tolist())) + 10
    sampled = hire.generate(
        fast, tokens, new_tokens=4, temperature=1.0, top_k=np.asarray([1, 8]), min_p=0.01
    )
    assert sampled[0].tolist() == hire.generate(fast, tokens, new_tokens=4)[0].tolist()
