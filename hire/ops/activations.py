"""Activations of feed-forward layers."""

import jax

from hire.types import Array, Float

# Activations of a gate: tanh GELU in Gemma, SiLU in Llama and Qwen.
GATED_ACTIVATIONS = ("gelu_tanh", "silu")
ACTIVATIONS = ("relu", *GATED_ACTIVATIONS)


def activate(
    up: Float[Array, "*b f"], gate: Float[Array, "*b f"] | None, activation: str
) -> Float[Array, "*b f"]:
    """Return the activations of neurons.

    Args:
        up: Products of queries and `up` rows `(*b, f)`.
        gate: Products of queries and `gate` rows `(*b, f)`. None for a layer without gate.
        activation: "relu" without a gate, else one of `GATED_ACTIVATIONS`.

    Returns:
        ReLU of `up`, or the activation of `gate` times `up`: `(*b, f)`.
    """
    if gate is None:
        return jax.nn.relu(up)
    if activation == "silu":
        return jax.nn.silu(gate) * up
    return jax.nn.gelu(gate, approximate=True) * up


def check_activation(activation: str | None, is_gated: bool) -> str:
    """Check that a layer can have an activation.

    Args:
        activation: Name of the activation, or None.
        is_gated: Whether the layer has a gate.

    Returns:
        The name; for None "relu".

    Raises:
        ValueError: If the layer cannot have this activation, or is gated and the name is None.
    """
    supported = GATED_ACTIVATIONS if is_gated else ("relu",)
    if activation is None and not is_gated:
        return "relu"
    if activation is None or activation not in supported:
        layer = "a layer with a gate" if is_gated else "a layer without a gate"
        raise ValueError(
            f"activation = {activation!r}: expected {' or '.join(map(repr, supported))} for {layer}"
        )
    return activation
