"""Direction getters: the last layers of a model, which turn its features into directions, and their loss.

Each module has one family; `DIRECTION_GETTERS` has all by key, and `make_direction_getter` makes one. A new getter is a
subclass of `DirectionGetter` in that table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from dwiml_func._checks import check_choice
from dwiml_func.models.direction_getters.base import DirectionGetter
from dwiml_func.models.direction_getters.fisher_von_mises import FisherVonMises, FisherVonMisesMixture
from dwiml_func.models.direction_getters.gaussian import Gaussian, GaussianMixture
from dwiml_func.models.direction_getters.regression import CosinePlusL2Regression, CosineRegression, L2Regression
from dwiml_func.models.direction_getters.sphere_classification import (
    SmoothSphereClassification,
    SphereClassification,
)

__all__ = [
    "DIRECTION_GETTERS",
    "CosinePlusL2Regression",
    "CosineRegression",
    "DirectionGetter",
    "DirectionGetterKey",
    "FisherVonMises",
    "FisherVonMisesMixture",
    "Gaussian",
    "GaussianMixture",
    "L2Regression",
    "SmoothSphereClassification",
    "SphereClassification",
    "make_direction_getter",
]

DIRECTION_GETTERS: dict[str, type[DirectionGetter]] = {
    getter.key: getter
    for getter in (
        CosineRegression,
        L2Regression,
        CosinePlusL2Regression,
        SphereClassification,
        SmoothSphereClassification,
        Gaussian,
        GaussianMixture,
        FisherVonMises,
        FisherVonMisesMixture,
    )
}
"""The getters by their keys on the command line. To add one, add its class here."""

if TYPE_CHECKING:
    DirectionGetterKey = str
else:
    DirectionGetterKey = Literal[tuple(DIRECTION_GETTERS)]
"""The keys of direction getters on the command line."""


def make_direction_getter(
    dg_key: str,
    input_size: int,
    *,
    dropout: float = 0.0,
    add_eos: bool = False,
    eos_weight: float = 1.0,
    **options: Any,
) -> DirectionGetter:
    """Make a direction getter from its key and its options, which are dwi_ml's `dg_key` and `dg_args`.

    Args:
        dg_key: a key of `DIRECTION_GETTERS`.
        input_size: features at a point.
        dropout: probability of dropping a value between the layers when training, 0 <= dropout < 1.
        add_eos: learn where streamlines end.
        eos_weight: weight of the EOS loss relative to that of the direction.
        **options: the getter's further options, see its `option_names`.

    Returns:
        A new module, with random parameters from torch's generator.

    Raises:
        ValueError: there is no such getter, it has no such option, or an argument is out of range.

    Example:
        >>> make_direction_getter("l2-regression", 100, normalize_targets=1.0).output_size
        3
        >>> make_direction_getter("cosine-regression", 100, nb_gaussians=3)
        Traceback (most recent call last):
        ...
        ValueError: nb_gaussians: cosine-regression has no such option. Leave it out or choose another direction getter.
    """
    check_choice("dg_key", dg_key, DIRECTION_GETTERS)
    getter = DIRECTION_GETTERS[dg_key]
    for name in options:
        if name not in getter.option_names:
            hint = "Leave it out or choose another direction getter."
            raise ValueError(f"{name}: {dg_key} has no such option. {hint}")
    arguments: dict[str, Any] = {"dropout": dropout, "add_eos": add_eos, "eos_weight": eos_weight, **options}
    return getter(input_size, **arguments)
