"""What the methods start from: recipes by data set, and the choices of a run.

Data and no more: ``config`` fills runs with it, ``methods`` builds the methods.
"""

from typing import Any, NamedTuple

# How a density may be shared among the layers; mostafa_wang keeps the first layer, the
# last (not that of a ResNet-50) and the shortcuts dense, and the density is that of the
# others.
SHARES = ("uniform", "erdos_renyi", "erdos_renyi_kernel", "linear", "mostafa_wang")
# The share of the weights that is kept, where a run does not say.
DENSITY = 0.05
# The choices of sparse momentum.
DECAYS = ("cosine", "linear", "constant")
PRUNE = ("magnitude", "global_magnitude")
REDISTRIBUTE = ("momentum", "magnitude", "nonzeros", "size", "none")
GROW = ("momentum", "gradient", "random", "momentum_per_neuron", "global_momentum")
# How a run trains: its optimizer, its learning rate and what it does to images.
OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("drops", "one_cycle")
AUGMENT = ("none", "reflect", "zero", "random_resized_crop")
PIXELS = ("channels", "half")
# What finds the mask of a ticket, and what a weight of the mask is.
FINDERS = ("sparse_momentum", "gsm", "magnitude")
PATTERNS = ("weights", "2:4")
# Values of a run that some methods read, and which; other methods refuse them.
_RULES = ("sparse_momentum", "ticket")
_CYCLES = (
    *_RULES,
    "ham",
    "sparse_evolutionary",
    "dynamic_sparse",
    "rigl",
    "in_time_over_parameterization",
    "long_average_regrow",
    "falling_budget_regrow",
    "granet",
    "gradual_magnitude",
    "iterative_magnitude",
    "learning_compression",
)
READ_BY = {
    "update_epochs": _CYCLES,
    "cycles": _CYCLES,
    "prune_rate": (*_RULES, "ham"),
    "prune_decay": (*_RULES, "ham"),
    "prune": _RULES,
    "redistribute": _RULES,
    "grow": _RULES,
    "l1": ("l1",),
    "ticket": ("ticket",),
    "finder": ("ticket",),
    "gate": ("gsm", "ticket"),
    "settle_epoch": ("gsm", "ticket"),
}
# Methods that train with Adam, and what they therefore do not read.
ADAM = (
    "soft_weight_sharing",
    "sparse_variational_dropout",
    "l0_regularization",
)
OF_OPTIMIZERS = ("optimizer", "momentum", "nesterov", "weight_decay", "decay")
TWO_OF_FOUR = ("gradual_magnitude", "wanda", "sparse_gpt")


class Method(NamedTuple):
    """What a run of a method starts from and reads; its builder is in ``methods``.

    Attributes:
      recipe: ``"scratch"``, ``"trained"`` (a dense network first) or ``"gsm"``.
      shares: how its density is shared among the layers, unless the run says.
      cut_only: it reads the density after training only, so that runs at several
        densities share theirs.
      trains_as: the method that trains alike before its own cut; the runs of both share
        their training.
      pooled: it ranks the weights of all layers at once, whatever the shares.
      moves: it moves weights between the layers while it trains.
    """

    recipe: str = "scratch"
    shares: str = "uniform"
    cut_only: bool = False
    trains_as: str | None = None
    pooled: bool = False
    moves: bool = False


METHODS: dict[str, Method] = {
    "dense": Method(),
    "sparse_momentum": Method(moves=True),
    "gsm": Method(recipe="gsm", pooled=True),
    "sparse_evolutionary": Method(shares="erdos_renyi"),
    "dynamic_sparse": Method(moves=True),
    "rigl": Method(shares="erdos_renyi_kernel"),
    "in_time_over_parameterization": Method(shares="erdos_renyi_kernel"),
    "deep_rewiring": Method(),
    "ham": Method(moves=True),
    "long_average_regrow": Method(shares="erdos_renyi_kernel"),
    "falling_budget_regrow": Method(shares="erdos_renyi_kernel"),
    "static": Method(),
    "thin": Method(),  # of a smaller model, which the run's values name
    "snip": Method(pooled=True),
    "synflow": Method(pooled=True),
    "ticket": Method(moves=True),
    "gradual_magnitude": Method(),
    "granet": Method(shares="erdos_renyi_kernel"),
    "iterative_magnitude": Method(),
    "one_shot_magnitude": Method(),
    "ac_dc": Method(),
    "straight_through_magnitude": Method(),
    "top_kast": Method(),
    "network_surgery": Method(recipe="trained"),
    "magnitude": Method(recipe="trained", pooled=True),
    "fisher": Method(recipe="trained", pooled=True),
    "optimal_brain_damage": Method(recipe="trained", pooled=True),
    "layerwise_obs": Method(recipe="trained"),
    "l1": Method(cut_only=True, pooled=True),
    "l2": Method(cut_only=True, pooled=True),
    "learning_compression": Method(recipe="trained", pooled=True),
    "soft_weight_sharing": Method(recipe="trained", pooled=True),
    "sparse_variational_dropout": Method(cut_only=True, pooled=True),
    "l0_regularization": Method(cut_only=True, pooled=True),
    "wanda": Method(cut_only=True, trains_as="l2"),
    "sparse_gpt": Method(cut_only=True, trains_as="l2"),
}

# The functions of the library that the methods are, where the name is another.
FUNCTIONS = {
    "sparse_momentum": "sparse_momentum_regrow",
    "static": "static_sparse",
    "snip": "snip_masks",
    "synflow": "synflow_masks",
    "magnitude": "magnitude_masks",
    "fisher": "fisher_masks",
    "optimal_brain_damage": "optimal_brain_damage_masks",
    "l1": "add_l1_decay",
    "wanda": "wanda_masks",
}
# What else the methods are called, in small letters.
COMMON_NAMES = {
    "sparse_momentum": ("snfs",),
    "sparse_evolutionary": ("set",),
    "dynamic_sparse": ("dsr",),
    "in_time_over_parameterization": ("itop",),
    "deep_rewiring": ("deepr", "deep_r"),
    "static": ("random",),
    "ticket": ("lottery_ticket",),
    "gradual_magnitude": ("gmp",),
    "iterative_magnitude": ("imp",),
    "ac_dc": ("acdc",),
    "straight_through_magnitude": ("ste",),
    "top_kast": ("topkast",),
    "network_surgery": ("dns",),
    "optimal_brain_damage": ("obd",),
    "layerwise_obs": ("lobs", "l_obs"),
    "sparse_gpt": ("sparsegpt",),
    "learning_compression": ("lc",),
    "soft_weight_sharing": ("sws",),
    "sparse_variational_dropout": ("vd",),
    "l0_regularization": ("l0",),
}
_NAMED = {
    **{name: name for name in METHODS},
    # Functions beside the one that the command uses.
    **{"gsm_mask": "gsm", "ticket_masks": "ticket"},
    **{function: name for name, function in FUNCTIONS.items()},
    **{short: name for name, others in COMMON_NAMES.items() for short in others},
}


def method_named(text: str) -> str:
    """The method of a name: its own, that of its function, or a common one.

    Args:
      text: the name, in upper or lower case, with ``-`` or ``_``.

    Returns:
      A key of :data:`METHODS`.

    Raises:
      ValueError: for an unknown name, listing all.

    Examples:
      >>> from sparse_optax.experiments import recipes
      >>> recipes.method_named("DEEP-R"), recipes.method_named("snip_masks")
      ('deep_rewiring', 'snip')
    """
    name = str(text).strip().lower().replace("-", "_")
    if name not in _NAMED:
        raise ValueError(
            f"TrainConfig: method={text!r}; choose one of {', '.join(METHODS)}, or a "
            "common name that `sparse-optax methods` lists."
        )
    return _NAMED[name]


DENSE: dict[str, Any] = dict(method="dense", density=1.0)
_PLAIN: dict[str, Any] = dict(
    optimizer="sgd",
    schedule="drops",
    warmup_epochs=0,
    augment="none",
    pixels="channels",
)
SGD: dict[str, Any] = dict(
    momentum=0.9, weight_decay=5e-4, decay="all", init="torch", **_PLAIN
)
_LEE_MNIST: dict[str, Any] = dict(
    epochs=100, batch_size=100, learning_rate=0.1, drop_steps=(25_000, 50_000)
)
# A short one of this library's own for the text.
_TEXT: dict[str, Any] = dict(
    epochs=15,
    batch_size=32,
    learning_rate=3e-3,
    optimizer="adamw",
    schedule="one_cycle",
    weight_decay=0.1,
    decay="kernels",
)
# The plain recipe of a ResNet-50, as Mostafa and Wang had it
# (https://arxiv.org/abs/1902.05967).
_IMAGENET: dict[str, Any] = dict(
    learning_rate=0.1, weight_decay=1e-4, augment="random_resized_crop"
)
# Recipes by data set: the protocol of Lee et al. as the sparse momentum paper ran it
# (https://arxiv.org/abs/1907.04840), and a short one for the digits.
RECIPES: dict[str, dict[str, Any]] = {
    "digits": dict(epochs=100, batch_size=32, learning_rate=0.1, drop_epochs=(60, 85)),
    "mnist": _LEE_MNIST,
    "fashion-mnist": _LEE_MNIST,
    "cifar10": dict(
        epochs=250,
        batch_size=128,
        learning_rate=0.1,
        drop_steps=(30_000, 60_000),
        augment="reflect",
    ),
    "imagenet": dict(epochs=100, batch_size=256, drop_epochs=(30, 60, 90), **_IMAGENET),
    "topics": _TEXT,
}
# GSM starts from a trained network and needs a momentum near one to carry the passive
# weights to zero (https://arxiv.org/abs/1909.12778).
GSM: dict[str, Any] = dict(
    momentum=0.99, weight_decay=5e-4, decay="kernels", init="xavier", **_PLAIN
)
_GSM_MNIST: dict[str, Any] = dict(
    epochs=240,
    batch_size=256,
    learning_rate=3e-2,
    drop_epochs=(160, 200),
    base=dict(
        epochs=100,
        batch_size=256,
        learning_rate=3e-2,
        drop_epochs=(20, 40, 60, 80),
        momentum=0.9,
    ),
)
GSM_RECIPES: dict[str, dict[str, Any]] = {
    "digits": dict(
        # Few steps: decay is four times as strong, to reach zero all the same.
        weight_decay=2e-3,
        epochs=300,
        batch_size=64,
        learning_rate=1e-2,
        drop_epochs=(200, 250),
        base=dict(
            epochs=40,
            batch_size=64,
            learning_rate=3e-2,
            drop_epochs=(20, 30),
            momentum=0.9,
        ),
    ),
    "mnist": _GSM_MNIST,
    "fashion-mnist": _GSM_MNIST,
    # As the authors' code has it for ResNet-56, which has no Nesterov there.
    "cifar10": dict(
        epochs=600,
        batch_size=64,
        learning_rate=5e-3,
        drop_epochs=(400, 500),
        momentum=0.98,
        weight_decay=1e-4,
        warmup_epochs=5,
        augment="zero",
        pixels="half",
        base=dict(
            epochs=500,
            batch_size=64,
            learning_rate=0.1,
            drop_epochs=(100, 200, 300, 400),
            momentum=0.9,
        ),
    ),
    # A ResNet-50, from the dense network of the plain recipe.
    "imagenet": _IMAGENET
    | dict(
        epochs=60,
        batch_size=64,
        learning_rate=1e-3,
        drop_epochs=(40, 50),
        momentum=0.98,
        init="torch",
        base=dict(
            epochs=100,
            batch_size=256,
            learning_rate=0.1,
            drop_epochs=(30, 60, 90),
            momentum=0.9,
        ),
    ),
    # Decoupled decay carries a passive weight to exp(-sum(rate * decay)) of itself.
    "topics": _TEXT
    | dict(
        weight_decay=2.5,
        init="torch",
        base=dict(
            epochs=15,
            batch_size=32,
            learning_rate=3e-3,
            drop_epochs=(),
            momentum=0.9,
            weight_decay=0.1,
        ),
    ),
}


# Methods that start from a trained network: the same learning rates and as many epochs
# in all, of which the dense training has those before the first drop.
_TRAINED_MNIST: dict[str, Any] = dict(
    epochs=54,
    batch_size=100,
    learning_rate=0.01,
    drop_steps=(25_000,),
    base=dict(
        epochs=46, batch_size=100, learning_rate=0.1, drop_epochs=(), momentum=0.9
    ),
)
TRAINED_RECIPES: dict[str, dict[str, Any]] = {
    "digits": dict(
        epochs=40,
        batch_size=32,
        learning_rate=0.01,
        drop_epochs=(25,),
        base=dict(
            epochs=60, batch_size=32, learning_rate=0.1, drop_epochs=(), momentum=0.9
        ),
    ),
    "mnist": _TRAINED_MNIST,
    "fashion-mnist": _TRAINED_MNIST,
    "cifar10": dict(
        epochs=165,
        batch_size=128,
        learning_rate=0.01,
        drop_steps=(30_000,),
        base=dict(
            epochs=85, batch_size=128, learning_rate=0.1, drop_epochs=(), momentum=0.9
        ),
        augment="reflect",
    ),
    "imagenet": _IMAGENET
    | dict(
        epochs=70,
        batch_size=256,
        learning_rate=0.01,
        drop_epochs=(30, 60),
        base=dict(
            epochs=30,
            batch_size=256,
            learning_rate=0.1,
            drop_epochs=(),
            momentum=0.9,
        ),
    ),
    "topics": _TEXT
    | dict(
        epochs=8,
        base=dict(
            epochs=7, batch_size=32, learning_rate=3e-3, drop_epochs=(), momentum=0.9
        ),
    ),
}
BY_METHOD = {"scratch": RECIPES, "trained": TRAINED_RECIPES, "gsm": GSM_RECIPES}
