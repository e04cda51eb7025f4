"""A reference implementation of the decoder in plain numpy, to check the JAX model against.

It was written from the descriptions of the models alone and shares no code with hire.models. It
reads the weights by the names of a GGUF: one text, no cache, no compiled step, float64 where it is
cheap.
"""

from collections.abc import Callable

import numpy as np

Weights = Callable[[str], np.ndarray]


def norm(x, scale, epsilon=1e-6):
    """Apply RMSNorm."""
    mean_square = np.mean(x.astype(np.float64) ** 2, -1, keepdims=True)
    return x / np.sqrt(mean_square + epsilon).astype(x.dtype) * scale


def rotary(x, base, factors=1.0, *, interleaved=False):
    """Rotate the pair (i, i + e/2) of x (t, heads, e) at position p by p / (base^(2i/e) factor_i).

    With `interleaved` the pairs are (2i, 2i + 1), as in GGUF files of Llama.
    """
    t, _, e = x.shape
    angle = np.arange(t)[:, None] / (base ** (2 * np.arange(e // 2) / e) * np.asarray(factors))
    if interleaved:
        first, second = x[..., ::2], x[..., 1::2]
    else:
        first, second = x[..., : e // 2], x[..., e // 2 :]
    rotated = (first + 1j * second) * np.exp(1j * angle)[:, None, :]
    if interleaved:
        return np.stack([rotated.real, rotated.imag], -1).reshape(x.shape).astype(x.dtype)
    return np.concatenate([rotated.real, rotated.imag], -1).astype(x.dtype)


def gelu(x):
    """Apply GELU in its tanh approximation."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def silu(x):
    """Apply SiLU."""
    return x / (1 + np.exp(-x))


def soft_cap(x, cap):
    """Apply a soft cap; 0 is none."""
    return cap * np.tanh(x / cap) if cap else x


def attention(x, weights: Weights, layer: int, config, interleaved: bool):
    """Apply the attention of a layer to x (t, d)."""
    t, e = len(x), config.head_width
    is_global = layer % config.global_every == config.global_every - 1
    base = config.rope_base if is_global else config.local_rope_base
    factors = config.rope_factors if is_global and config.rope_factors else 1.0
    heads = {}
    for part in ("q", "k", "v"):
        products = x @ weights(f"blk.{layer}.attn_{part}.weight").T
        if config.qkv_bias:
            products = products + weights(f"blk.{layer}.attn_{part}.bias")
        heads[part] = products.reshape(t, -1, e)
    for part in ("q", "k"):
        if config.qk_norm:
            scale = weights(f"blk.{layer}.attn_{part}_norm.weight")
            heads[part] = norm(heads[part], scale, config.norm_epsilon)
        heads[part] = rotary(heads[part], base, factors, interleaved=interleaved)
    distance = np.subtract.outer(np.arange(t), np.arange(t))
    is_masked = (distance < 0) | ((distance >= config.window) & (not is_global))
    scale = 1 / np.sqrt(e) if config.attention_scale is None else config.attention_scale
    outputs = []
    for head in range(config.heads):
        kv_head = head // (config.heads // config.kv_heads)
        scores = heads["q"][:, head] @ heads["k"][:, kv_head].T * scale
        scores = np.where(is_masked, -np.inf, soft_cap(scores, config.attention_soft_cap))
        probabilities = np.exp(scores - scores.max(-1, keepdims=True))
        probabilities /= probabilities.sum(-1, keepdims=True)
        outputs.append(probabilities @ heads["v"][:, kv_head])
    return np.concatenate(outputs, -1) @ weights(f"blk.{layer}.attn_output.weight").T


def hidden_states(
    tokens: np.ndarray, weights: Weights, config, *, interleaved: bool = False
) -> np.ndarray:
    """Return the hidden states (t, d) after each token.

    Args:
        tokens: Tokens (t,).
        weights: Function from the GGUF name of a weight to its array.
        config: Configuration of the model; only gated ones are supported.
        interleaved: Whether queries and keys are permuted, as in GGUF files of Llama.
    """
    epsilon = config.norm_epsilon
    activation = silu if config.activation == "silu" else gelu
    x = weights("token_embd.weight")[tokens]
    if config.scaled_embedding:
        x = x * np.float32(config.width**0.5)

    def post_norm(x, name):
        return norm(x, weights(name), epsilon) if config.post_norms else x

    for layer in range(config.layers):
        prefix = f"blk.{layer}."
        normed = norm(x, weights(prefix + "attn_norm.weight"), epsilon)
        mixed = attention(normed, weights, layer, config, interleaved)
        x = x + post_norm(mixed, prefix + "post_attention_norm.weight")
        y = norm(x, weights(prefix + "ffn_norm.weight"), epsilon)
        y = activation(y @ weights(prefix + "ffn_gate.weight").T) * (
            y @ weights(prefix + "ffn_up.weight").T
        )
        y = y @ weights(prefix + "ffn_down.weight").T
        x = x + post_norm(y, prefix + "post_ffw_norm.weight")
    return norm(x, weights("output_norm.weight"), epsilon)


def logits(hidden: np.ndarray, weights: Weights, config) -> np.ndarray:
    """Return the logits (t, v) of hidden states (t, d)."""
    rows = weights("token_embd.weight" if config.tied else "output.weight")
    return soft_cap(hidden.astype(np.float32) @ rows.T, config.logit_soft_cap)


def losses(
    tokens: np.ndarray, weights: Weights, config, *, interleaved: bool = False
) -> np.ndarray:
    """Return -log p (t - 1,) of each next token, in nats."""
    hidden = hidden_states(tokens, weights, config, interleaved=interleaved)[:-1]
    scores = logits(hidden, weights, config).astype(np.float64)
    max_score = scores.max(-1, keepdims=True)
    return (
        np.log(np.exp(scores - max_score).sum(-1))
        + max_score[:, 0]
        - scores[np.arange(len(tokens) - 1), tokens[1:]]
    )
