"""A reference implementation of Gemma 3 in plain numpy, to check the JAX model against.

It was written from the description of the model alone and shares no code with hire.models. It reads
the weights by the names of the file: one text, no cache, no compiled step, float64 where it is
cheap.
"""

from collections.abc import Callable

import numpy as np

Weights = Callable[[str], np.ndarray]


def norm(x, scale):
    """Apply RMSNorm."""
    return (
        x
        / np.sqrt(np.mean(x.astype(np.float64) ** 2, -1, keepdims=True) + 1e-6).astype(x.dtype)
        * scale
    )


def rotary(x, base):
    """Rotate the pair (i, i + e/2) of x (t, heads, e) at position p by p / base^(2i/e)."""
    t, _, e = x.shape
    angle = np.arange(t)[:, None] / base ** (2 * np.arange(e // 2) / e)
    rotated = (x[..., : e // 2] + 1j * x[..., e // 2 :]) * np.exp(1j * angle)[:, None, :]
    return np.concatenate([rotated.real, rotated.imag], -1).astype(x.dtype)


def gelu(x):
    """Apply GELU in its tanh approximation."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def attention(x, weights: Weights, layer: int, config):
    """Apply the attention of a layer to x (t, d)."""
    t, e = len(x), config.head_width
    is_global = layer % config.global_every == config.global_every - 1
    base = config.rope_base if is_global else config.local_rope_base
    queries, keys, values = (
        (x @ weights(f"blk.{layer}.attn_{part}.weight").T).reshape(t, -1, e)
        for part in ("q", "k", "v")
    )
    queries = rotary(norm(queries, weights(f"blk.{layer}.attn_q_norm.weight")), base)
    keys = rotary(norm(keys, weights(f"blk.{layer}.attn_k_norm.weight")), base)
    distance = np.subtract.outer(np.arange(t), np.arange(t))
    is_masked = (distance < 0) | ((distance >= config.window) & (not is_global))
    heads = []
    for head in range(config.heads):
        kv_head = head // (config.heads // config.kv_heads)
        scores = np.where(is_masked, -np.inf, queries[:, head] @ keys[:, kv_head].T / np.sqrt(e))
        probabilities = np.exp(scores - scores.max(-1, keepdims=True))
        heads.append(probabilities / probabilities.sum(-1, keepdims=True) @ values[:, kv_head])
    return np.concatenate(heads, -1) @ weights(f"blk.{layer}.attn_output.weight").T


def hidden_states(tokens: np.ndarray, weights: Weights, config) -> np.ndarray:
    """Return the hidden states (t, d) after each token.

    Args:
        tokens: Tokens (t,).
        weights: Function from the GGUF name of a weight to its array.
        config: Configuration of the model; only gated ones are supported.
    """
    x = weights("token_embd.weight")[tokens] * np.float32(config.width**0.5)
    for layer in range(config.layers):
        prefix = f"blk.{layer}."
        mixed = attention(norm(x, weights(prefix + "attn_norm.weight")), weights, layer, config)
        x = x + norm(mixed, weights(prefix + "post_attention_norm.weight"))
        y = norm(x, weights(prefix + "ffn_norm.weight"))
        y = gelu(y @ weights(prefix + "ffn_gate.weight").T) * (
            y @ weights(prefix + "ffn_up.weight").T
        )
        x = x + norm(
            y @ weights(prefix + "ffn_down.weight").T, weights(prefix + "post_ffw_norm.weight")
        )
    return norm(x, weights("output_norm.weight"))


def losses(tokens: np.ndarray, weights: Weights, config) -> np.ndarray:
    """Return -log p (t - 1,) of each next token, in nats."""
    logits = (
        hidden_states(tokens, weights, config)[:-1].astype(np.float32)
        @ weights("token_embd.weight").T
    ).astype(np.float64)
    max_logit = logits.max(-1, keepdims=True)
    return (
        np.log(np.exp(logits - max_logit).sum(-1))
        + max_logit[:, 0]
        - logits[np.arange(len(tokens) - 1), tokens[1:]]
    )
