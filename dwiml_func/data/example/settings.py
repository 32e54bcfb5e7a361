"""What may differ in the example data: noise, directions, what crosses the bundles, and which person is held out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dwiml_func._checks import check_choice, check_number
from dwiml_func.data.example.bundles import SUBJECTS

__all__ = ["B_VALUE", "DEFAULT_SETTINGS", "NUM_B0", "VOXEL_MM", "ExampleSettings"]

VOXEL_MM = 2.0
"""Side of a voxel."""
B_VALUE = 1000.0
"""s/mm^2, of the weighted images."""
NUM_B0 = 6
"""How many unweighted images there are."""

_MOST_CROSSINGS = 8
_ORDERS = {6: 2, 15: 4, 28: 6}  # from so many directions on


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleSettings:
    """The options of the example data; the defaults are those of the first run."""

    snr: float = 20.0
    """Signal-to-noise ratio of one unweighted image, S0 / sigma; inf for none of the noise."""
    nb_directions: int = 60
    """Number of diffusion directions, at least 6. Harmonics have order 2 from 6, 4 from 15, 6 from 28 on."""
    distractors: int = 0
    """Number of unlabelled bundles for each labelled one that run along it for a while and branch off."""
    crossings: int = 0
    """Number of unlabelled bundles that cross each labelled one, at 60 to 90 degrees and as dense: a diffusion tensor
    cannot tell them apart."""
    simulator: Literal["tensors", "trxscan"] = "tensors"
    """What computes the signal. tensors: one for each fibre, in a second. trxscan: an EPI acquisition with distortion,
    ringing and decay; it needs the package trxscan and about a minute."""
    test_subject: str = SUBJECTS[-1]
    """The person of the testing subset: sub_1 to sub_5. The one before it validates (before sub_1: sub_5), the others
    train."""

    def __post_init__(self) -> None:
        if not self.snr > 0:
            raise ValueError(f"snr: expected a number above 0. Received: {self.snr}.")
        check_number("nb_directions", self.nb_directions, at_least=min(_ORDERS))
        for name in ("distractors", "crossings"):
            value = getattr(self, name)
            check_number(name, value, at_least=0)
            if value > _MOST_CROSSINGS:
                raise ValueError(f"{name}: expected at most {_MOST_CROSSINGS}. Received: {value}.")
        check_choice("test_subject", self.test_subject, SUBJECTS)

    @property
    def sh_order(self) -> int:
        """Of the spherical harmonics: as many as the directions determine, at most 6."""
        return max(order for least, order in _ORDERS.items() if self.nb_directions >= least)

    @property
    def subsets(self) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        """The people who train, validate and test."""
        row = SUBJECTS.index(self.test_subject)
        validation = SUBJECTS[row - 1]
        training = tuple(name for name in SUBJECTS if name not in (validation, self.test_subject))
        return training, (validation,), (self.test_subject,)


DEFAULT_SETTINGS = ExampleSettings()
"""Those of the first run."""
