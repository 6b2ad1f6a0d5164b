"""Settings and fixtures that every test file shares."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

# Compiled code makes the first example of a strategy slow, so no deadline; the
# examples are the same on every machine, so that a failure here fails everywhere.
hypothesis.settings.register_profile(
    "sparse_optax",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=25,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "sparse_optax"))


@pytest.fixture
def data_dir() -> pathlib.Path:
    """The folder with the real data sets, or a skip that says how to get one."""
    folder = os.environ.get("SPARSE_OPTAX_DATA")
    if not folder:
        pytest.skip("SPARSE_OPTAX_DATA is not set: it names the folder of data sets")
    if not pathlib.Path(folder).is_dir():
        pytest.skip(f"SPARSE_OPTAX_DATA={folder} is not a folder")
    return pathlib.Path(folder)
