"""Which form a program takes: by the platform that it is compiled for, or the one that is named."""

from collections.abc import Callable

import jax

from hire.axes import Array


def by_platform(cpu: Callable, others: Callable):
    """cpu() on a CPU and others() elsewhere: settled when the program is compiled, which may be for a device that is not there."""
    return jax.lax.platform_dependent(cpu=cpu, default=others)


FORMS = ("auto", "plain", "kernel")


def by_form(form: str, plain: Callable[[], Array], kernel: Callable[[], Array]) -> Array:
    """plain() or kernel(), a Pallas TPU kernel, as `form` says; of "auto" the kernel on a TPU. A named one stays it."""
    if form == "auto":
        return jax.lax.platform_dependent(tpu=kernel, default=plain)
    return kernel() if form == "kernel" else plain()


def check_form(form: str) -> None:
    """Raise ValueError unless form is one of FORMS."""
    if form not in FORMS:
        raise ValueError(f"form = {form!r}: expected one of {', '.join(FORMS)}")
