"""The installed wheel works where only the core dependencies are present.

Run with the interpreter of an environment that holds the wheel and what it requires,
from a folder that is not the checkout.
"""

import importlib.metadata
import importlib.util
import pathlib
import sys

import jax
import jax.numpy as jnp
import optax

import sparse_optax

EXTRAS = ("flax", "matplotlib", "orbax", "pooch", "rich", "sklearn", "tyro", "chex")

present = [name for name in EXTRAS if importlib.util.find_spec(name)]
assert not present, f"not an environment of core dependencies alone: {present}"

package = pathlib.Path(sparse_optax.__file__)
assert package.is_relative_to(sys.prefix), f"{package} is not the installed wheel"

metadata = importlib.metadata.metadata("sparse_optax")
assert metadata["License-Expression"] == "Apache-2.0", metadata["License-Expression"]
files = [str(file) for file in importlib.metadata.files("sparse_optax") or ()]
assert any(file.endswith("licenses/LICENSE") for file in files), files
assert "sparse_optax/py.typed" in files, files
assert "sparse_optax_command.py" in files, files
strays = [file for file in files if file.startswith(("tests", "notebooks", "docs"))]
assert not strays, f"the wheel installs more than the package: {strays}"

tx = sparse_optax.sparse_momentum_regrow(
    optax.sgd(0.1, momentum=0.9),
    density=0.25,
    update_period=3,
    update_stop=9,
    key=0,
)
params = {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)}
target = {"kernel": jnp.eye(8), "bias": jnp.zeros(8)}
state = tx.init(params)


@jax.jit
def step(params, state):
    grads = jax.tree.map(jnp.subtract, params, target)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


for _ in range(9):
    params, state = step(params, state)
    assert int(jnp.count_nonzero(params["kernel"])) <= 16

kept = sparse_optax.masks.count(sparse_optax.get_masks(state))
assert kept == 16, f"a quarter of 64 weights is 16, not {kept}"
print(f"sparse_optax {sparse_optax.__version__}: {kept} of 64 weights after 9 steps")
