"""Choice of the implementation, by the platform of the program or by name."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.sharding import AxisType

from hire.ops import cpu as cpu_kernels


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


IMPLEMENTATIONS = ("auto", "xla", "pallas", "cpu")


Result = TypeVar("Result")


def dispatch(
    implementation: str,
    plain: Callable[..., Result],
    *arguments,
    tpu: Callable[..., Result] | None = None,
    cpu: Callable[..., Result] | None = None,
) -> Result:
    """Run the plain JAX function or a kernel.

    Kernels have no derivatives, and JAX differentiates the branch of every platform, even of one
    that never runs. The derivative is therefore that of `plain`, whichever function runs.

    Args:
        implementation: "xla" forces `plain`, "pallas" forces `tpu`, "cpu" forces `cpu`; there is no
            fallback. "auto" runs `tpu` on a TPU, `cpu` on a CPU and `plain` elsewhere, and where
            the compiler divides arrays over devices: it cannot divide the work of a kernel.
        plain: The function in plain JAX.
        *arguments: Pytrees for all functions. Pass all arrays here that may be differentiated: the
            functions must not close over them.
        tpu: The same function as a Pallas TPU kernel, if these arguments are supported.
        cpu: The same function as a kernel for a CPU, if these arguments are supported.

    Returns:
        The result of the function that runs.

    Raises:
        ValueError: If a kernel is forced that does not support the arguments, or the CPU kernel is
            forced where it cannot run.
    """
    forced = {"pallas": tpu, "cpu": cpu}.get(implementation)
    if implementation in ("pallas", "cpu") and forced is None:
        raise ValueError(
            f"implementation = {implementation!r}: expected rows of a type and width that the "
            "kernel supports"
        )
    if implementation == "cpu":
        check_cpu_kernels()
    if implementation == "auto" and cpu is not None and not cpu_kernels.is_available():
        cpu = None
    if implementation == "auto" and compiler_divides_arrays():
        tpu = cpu = None
    if implementation == "xla" or (tpu is None and cpu is None):
        return plain(*arguments)

    @jax.custom_jvp
    def run(*arguments) -> Any:
        if forced is not None:
            return forced(*arguments)
        kernels = {name: kernel for name, kernel in dict(tpu=tpu, cpu=cpu).items() if kernel}
        return jax.lax.platform_dependent(*arguments, **kernels, default=plain)

    run.defjvp(lambda primals, tangents: jax.jvp(plain, primals, tangents))
    return run(*arguments)


def compiler_divides_arrays() -> bool:
    """Whether the compiler divides arrays over the devices of the mesh that jax.set_mesh has set.

    Inside jax.shard_map it does not.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    return any(size > 1 and kind != AxisType.Manual for size, kind in axes)


def check_implementation(implementation: str) -> None:
    """Check the name of an implementation, and that the CPU kernels can run if it names them.

    Raises:
        ValueError: If `implementation` is not in `IMPLEMENTATIONS`, or if it is "cpu" and the
            kernels cannot run.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation = {implementation!r}: expected one of {', '.join(IMPLEMENTATIONS)}"
        )
    if implementation == "cpu":
        check_cpu_kernels()


def check_cpu_kernels() -> None:
    """Check that the CPU kernels can run.

    Raises:
        ValueError: If the default device is no CPU, or if numba is missing or broken.
    """
    backend = jax.default_backend()
    reason = f"expected a CPU, not {backend}" if backend != "cpu" else cpu_kernels.problem()
    if reason is not None:
        raise ValueError(f"implementation = 'cpu': {reason}")
