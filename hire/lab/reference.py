"""Gemma 3 once more, in plain numpy and from the file's own names: what the JAX model is checked against.

Written from the description of the model alone and sharing no code with hire.models: one text, no cache, no compiled step, float64
where it is cheap.
"""

from collections.abc import Callable

import numpy as np

Weights = Callable[[str], np.ndarray]


def norm(x, scale):
    return x / np.sqrt(np.mean(x.astype(np.float64) ** 2, -1, keepdims=True) + 1e-6).astype(x.dtype) * scale


def rotary(x, base):
    """x (t, heads, e): the pair (i, i + e/2) at position p turned by p / base^(2i/e)."""
    t, _, e = x.shape
    angle = np.arange(t)[:, None] / base ** (2 * np.arange(e // 2) / e)
    turned = (x[..., : e // 2] + 1j * x[..., e // 2 :]) * np.exp(1j * angle)[:, None, :]
    return np.concatenate([turned.real, turned.imag], -1).astype(x.dtype)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def attention(x, weights: Weights, layer: int, config):
    t, e = len(x), config.head_width
    is_global = layer % config.global_every == config.global_every - 1
    base = config.rope_base if is_global else config.local_rope_base
    queries, keys, values = ((x @ weights(f"blk.{layer}.attn_{part}.weight").T).reshape(t, -1, e) for part in ("q", "k", "v"))
    queries = rotary(norm(queries, weights(f"blk.{layer}.attn_q_norm.weight")), base)
    keys = rotary(norm(keys, weights(f"blk.{layer}.attn_k_norm.weight")), base)
    distance = np.subtract.outer(np.arange(t), np.arange(t))
    hidden = (distance < 0) | ((distance >= config.window) & (not is_global))
    heads = []
    for head in range(config.heads):
        shared = head // (config.heads // config.kv_heads)
        scores = np.where(hidden, -np.inf, queries[:, head] @ keys[:, shared].T / np.sqrt(e))
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        heads.append(shares / shares.sum(-1, keepdims=True) @ values[:, shared])
    return np.concatenate(heads, -1) @ weights(f"blk.{layer}.attn_output.weight").T


def hidden_states(tokens: np.ndarray, weights: Weights, config) -> np.ndarray:
    """Hidden states (t, d) after each of tokens (t,); weights by their GGUF names, gated configurations only."""
    x = weights("token_embd.weight")[tokens] * np.float32(config.width**0.5)
    for layer in range(config.layers):
        at = f"blk.{layer}."
        mixed = attention(norm(x, weights(at + "attn_norm.weight")), weights, layer, config)
        x = x + norm(mixed, weights(at + "post_attention_norm.weight"))
        y = norm(x, weights(at + "ffn_norm.weight"))
        y = gelu(y @ weights(at + "ffn_gate.weight").T) * (y @ weights(at + "ffn_up.weight").T)
        x = x + norm(y @ weights(at + "ffn_down.weight").T, weights(at + "post_ffw_norm.weight"))
    return norm(x, weights("output_norm.weight"))


def losses(tokens: np.ndarray, weights: Weights, config) -> np.ndarray:
    """-log p (t - 1,) of each next token, in nats."""
    logits = (hidden_states(tokens, weights, config)[:-1].astype(np.float32) @ weights("token_embd.weight").T).astype(np.float64)
    top = logits.max(-1, keepdims=True)
    return np.log(np.exp(logits - top).sum(-1)) + top[:, 0] - logits[np.arange(len(tokens) - 1), tokens[1:]]
