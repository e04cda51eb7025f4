"""Choice of the implementation, by the platform of the program or by name."""

from collections.abc import Callable

import jax

from hire.types import Array


def by_platform(cpu: Callable, others: Callable):
    """Call `cpu` on a CPU and `others` on all other platforms.

    The choice is made when the program is compiled. The target device may be absent then.

    Args:
        cpu: Function without arguments for a CPU.
        others: Function without arguments for all other platforms.

    Returns:
        The result of the function for the platform.
    """
    return jax.lax.platform_dependent(cpu=cpu, default=others)


IMPLEMENTATIONS = ("auto", "xla", "pallas")


def dispatch(
    implementation: str, plain: Callable[..., Array], kernel: Callable[..., Array], *arguments
) -> Array:
    """Run the plain JAX function or the Pallas TPU kernel.

    Pallas kernels have no derivatives, and JAX differentiates the branch of every platform, even of
    one that never runs. The derivative is therefore that of `plain`, whichever function runs.

    Args:
        implementation: "xla" forces `plain`, "pallas" forces `kernel`; there is no fallback. "auto"
            runs `kernel` on a TPU and `plain` elsewhere.
        plain: The function in plain JAX.
        kernel: The same function as a Pallas TPU kernel.
        *arguments: Pytrees for both functions. Pass all arrays here that may be differentiated: the
            functions must not close over them.

    Returns:
        The result of the function that runs.
    """
    if implementation == "xla":
        return plain(*arguments)

    @jax.custom_jvp
    def run(*arguments):
        if implementation == "pallas":
            return kernel(*arguments)
        return jax.lax.platform_dependent(*arguments, tpu=kernel, default=plain)

    run.defjvp(lambda primals, tangents: jax.jvp(plain, primals, tangents))
    return run(*arguments)


def check_implementation(implementation: str) -> None:
    """Check the name of an implementation.

    Raises:
        ValueError: If `implementation` is not in `IMPLEMENTATIONS`.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation = {implementation!r}: expected one of {', '.join(IMPLEMENTATIONS)}"
        )
