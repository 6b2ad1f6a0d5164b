"""How flags of ``sparse-optax`` are read that are more than a number or a word."""

from fractions import Fraction
from typing import Any

from tyro.constructors import PrimitiveConstructorSpec

from sparse_optax.experiments import recipes


def share(text: str) -> float:
    """A share, as a number or in percent.

    Args:
      text: such as ``0.05`` or ``5%``.

    Returns:
      The number; whether it is in its range is checked with the run.

    Raises:
      ValueError: for no number.

    Examples:
      >>> from sparse_optax.experiments import flags
      >>> flags.share("0.29"), flags.share("29%"), flags.share("0.5 %")
      (0.29, 0.29, 0.005)
    """
    number = text.strip().removesuffix("%").strip()
    try:
        # As a fraction: 29 / 100.0 and 0.29 are not always one float.
        return float(Fraction(number) / 100) if "%" in text else float(number)
    except ValueError:
        raise ValueError(f"{text!r} must be a number, 0.05 or 5%.") from None


def _one(metavar: str, read: Any) -> PrimitiveConstructorSpec:
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: read(words[0]),
        is_instance=lambda value: True,
        str_from_instance=lambda value: [str(value)],
    )


SHARE = _one("SHARE", share)
METHOD = _one("{" + ",".join(recipes.METHODS) + "}", recipes.method_named)
