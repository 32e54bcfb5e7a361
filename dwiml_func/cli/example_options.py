"""Options that suit the built-in example data."""

from __future__ import annotations

__all__ = ["example_options"]

_COMMON = (
    *("--nb-previous-dirs", "1"),
    *("--weight-decay", "0"),
    *("--batch-size-training", "10"),
    *("--learning-rate", "0.002*20 0.0005"),
    *("--clip-grad", "1"),
    *("--max-epochs", "30"),
)
_CLASSES = ("--learning-rate", "0.005*20 0.001", "--use-skip-connection")


def example_options(dg_key: str = "cosine-regression") -> tuple[str, ...]:
    """Options of `dwiml-func train` on the example data, where the user gives no others.

    The defaults of the options are dwi_ml's, made for far larger data sets: on the example data they would make 5 steps
    an epoch. Of the 724 directions of sphere-classification, the data show each seldom.

    Args:
        dg_key: the direction getter.

    Example:
        >>> example_options()[:4]
        ('--nb-previous-dirs', '1', '--weight-decay', '0')
    """
    return _COMMON + (_CLASSES if dg_key == "sphere-classification" else ())
