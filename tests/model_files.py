"""Small models of every family, and their files, written by the libraries that others use."""

import json

import gguf
import numpy as np
from safetensors.numpy import save_file

import hire
from hire.models.config import DecoderConfig, llama3_rope_factors
from hire.models.tokenizer import sentencepiece_bpe

SIZES = dict(vocabulary=300, width=64, layers=2, heads=4, kv_heads=2, head_width=16, ffn_width=128)
PLAIN = dict(activation="silu", global_every=1, scaled_embedding=False, post_norms=False)
# 8 rotary frequencies of base 100.
FACTORS = llama3_rope_factors(
    16, 100.0, factor=8, low_freq_factor=1, high_freq_factor=4, original_context=64
)
CONFIGS = {
    "gemma2": DecoderConfig(
        **SIZES,
        global_every=2,
        qk_norm=False,
        window=16,
        rope_base=1e4,
        context=512,
        attention_soft_cap=5.0,
        logit_soft_cap=3.0,
        attention_scale=0.125,
    ),
    "gemma3": DecoderConfig(
        **SIZES, global_every=2, window=16, context=512, rope_factors=(8.0,) * 8
    ),
    "llama": DecoderConfig(
        **SIZES,
        **PLAIN,
        qk_norm=False,
        rope_base=100.0,
        rope_factors=FACTORS,
        norm_epsilon=1e-5,
        tied=False,
        context=512,
    ),
    "qwen2": DecoderConfig(**SIZES, **PLAIN, qk_norm=False, qkv_bias=True, context=512),
    "qwen3": DecoderConfig(**SIZES | dict(head_width=24), **PLAIN, context=512),
}

# A SentencePiece vocabulary: control pieces, bytes, and some pieces of text.
PIECES = ["<pad>", "<eos>", "<bos>", "<unk>"] + [f"<0x{byte:02X}>" for byte in range(256)]
PIECES += ["\n\n", "a", "b", "c", "\u2581", "ab", "\u2581a", "abc"]
KINDS = [3, 3, 3, 2] + [6] * 256 + [4] + [1] * 7
SCORES = [0.0] * 261 + [-10.0, -11.0, -12.0, -13.0, -1.0, -2.0, -3.0]
VOCABULARY = dict(tokens=PIECES, scores=SCORES, token_type=KINDS)

# Parts of names in a GGUF, and in Hugging Face files. The first one that fits counts.
PARTS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "output": "lm_head",
}


def gemma3_metadata(config):
    """What a GGUF of Gemma 3 states."""
    return {
        "gemma3.embedding_length": config.width,
        "gemma3.block_count": config.layers,
        "gemma3.feed_forward_length": config.ffn_width,
        "gemma3.context_length": config.context,
        "gemma3.attention.head_count": config.heads,
        "gemma3.attention.head_count_kv": config.kv_heads,
        "gemma3.attention.key_length": config.head_width,
        "gemma3.attention.value_length": config.head_width,
        "gemma3.attention.layer_norm_rms_epsilon": 1e-6,
        "gemma3.attention.sliding_window": config.window,
        "gemma3.attention.sliding_window_pattern": config.global_every,
        "gemma3.rope.freq_base": config.rope_base,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.bos_token_id": 2,
    }


def gemma3_fields(config):
    """What transformers writes for a model of Gemma 3."""
    types = [
        "full_attention" if config.is_global(i) else "sliding_attention"
        for i in range(config.layers)
    ]
    return dict(
        model_type="gemma3_text",
        vocab_size=config.vocabulary,
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        intermediate_size=config.ffn_width,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_width,
        rms_norm_eps=1e-6,
        sliding_window=config.window,
        layer_types=types,
        query_pre_attn_scalar=config.head_width,
        rope_theta=1000000.0,
        rope_local_base_freq=10000.0,
        rope_scaling=None,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        hidden_activation="gelu_pytorch_tanh",
        attention_bias=False,
        max_position_embeddings=config.context,
        torch_dtype="bfloat16",
    )


def write_gguf(path, arrays, metadata, *, architecture="gemma3", file_type=True, lists=VOCABULARY):
    """Write a GGUF with the writer of the gguf library."""
    writer = gguf.GGUFWriter(path, architecture)
    add_list = dict(
        tokens=writer.add_token_list,
        scores=writer.add_token_scores,
        token_type=writer.add_token_types,
        merges=writer.add_token_merges,
    )
    for name, values in lists.items():
        add_list[name](values)
    if file_type:
        writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for key, value in metadata.items():
        add = {
            str: writer.add_string,
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            list: writer.add_array,
        }
        if value is not None:
            add[type(value)](key, value)
    for name, array in arrays.items():
        writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def hub_names(arrays, *, gemma=True):
    """The weights of a GGUF under the names of Hugging Face files, as they are stored there."""
    result = {}
    for name, array in arrays.items():
        *layer, part, kind = name.split(".")
        new = PARTS.get(part, "pre_feedforward_layernorm" if gemma else "post_attention_layernorm")
        prefix = f"model.layers.{layer[1]}." if layer else ""
        is_norm = "norm" in part
        result[f"{prefix}{new}.{kind}"] = np.ascontiguousarray(
            array - 1 if gemma and is_norm else array
        )
    return result


def write_folder(folder, tensors, fields, tokenizer=None):
    """Write a folder of Hugging Face's files."""
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    tokenizer = tokenizer or sentencepiece_bpe(PIECES, SCORES, KINDS)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def searches_of(model, candidates):
    """A search of the softmax, and searches of the FFNs in which every group is a candidate."""
    rows, config = model.head_rows(), model.config
    estimator = hire.Quantized.fit(rows, 8)
    softmax = hire.HireSoftmax(rows, estimator, 4, candidates, soft_cap=config.logit_soft_cap)
    ffns = [
        hire.HireFFN(
            block.ffn.up[...],
            block.ffn.down[...],
            hire.Quantized.fit(block.ffn.gate[...], 8),
            block.ffn.gate[...],
            k=16,
            candidates=16,
            activation=config.ffn_activation,
        )
        for block in model.blocks
    ]
    return softmax, ffns
