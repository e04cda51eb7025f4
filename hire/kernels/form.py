"""Which form a program takes: by the platform that it is compiled for, or the one that is named."""

from collections.abc import Callable

import jax

from hire.axes import Array


def by_platform(cpu: Callable, others: Callable):
    """cpu() on a CPU and others() elsewhere: settled when the program is compiled, which may be for a device that is not there."""
    return jax.lax.platform_dependent(cpu=cpu, default=others)


FORMS = ("auto", "plain", "kernel")


def by_form(form: str, plain: Callable[..., Array], kernel: Callable[..., Array], *arguments) -> Array:
    """plain(*arguments) or kernel(*arguments), a Pallas TPU kernel, as `form` says; of "auto" the kernel on a TPU. A named one
    stays it. Arguments are pytrees; the functions close over no array that may be differentiated.

    Pallas kernels have no derivatives, and JAX differentiates the branch of a platform even where it never runs. The derivative is
    that of plain, whichever runs.
    """
    if form == "plain":
        return plain(*arguments)

    @jax.custom_jvp
    def run(*arguments):
        if form == "kernel":
            return kernel(*arguments)
        return jax.lax.platform_dependent(*arguments, tpu=kernel, default=plain)

    run.defjvp(lambda primals, tangents: jax.jvp(plain, primals, tangents))
    return run(*arguments)


def check_form(form: str) -> None:
    """Raise ValueError unless form is one of FORMS."""
    if form not in FORMS:
        raise ValueError(f"form = {form!r}: expected one of {', '.join(FORMS)}")
