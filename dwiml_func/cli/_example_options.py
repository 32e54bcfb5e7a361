"""Options that suit the built-in example data."""

from __future__ import annotations

from collections.abc import Mapping

from dwiml_func.cli._options import list_options
from dwiml_func.cli._parsing import parse
from dwiml_func.cli._run_options import RunOptions

__all__ = ["example_options", "kept_example_options"]

_COMMON = {
    "--nb-previous-dirs": "1",
    "--weight-decay": "0",
    "--batch-size-training": "10",
    "--learning-rate": "0.002*20 0.0005",
    "--clip-grad": "1",
    "--max-epochs": "30",
}
_CLASSES = {"--learning-rate": "0.005*20 0.001", "--use-skip-connection": ""}


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
    return tuple(text for option in _suited(dg_key).items() for text in option if text)


def kept_example_options(options: RunOptions) -> tuple[str, ...]:
    """Those of `example_options` that a run has.

    Args:
        options: the run's.

    Returns:
        The options, as on a command line.

    Example:
        >>> kept_example_options(RunOptions(training=TrainingConfig(max_epochs=30)))  # doctest: +SKIP
        ('--max-epochs', '30')
    """
    suited = parse(RunOptions, example_options(options.model.dg_key), "dwiml-func train")
    kept = {
        flag
        for option in list_options(RunOptions)
        for flag in option.flags
        if _value(options, option.part, option.name) == _value(suited, option.part, option.name)
    }
    pairs = _suited(options.model.dg_key).items()
    return tuple(text for flag, value in pairs if flag in kept for text in (flag, value) if text)


def _suited(dg_key: str) -> Mapping[str, str]:
    return _COMMON | (_CLASSES if dg_key == "sphere-classification" else {})


def _value(options: RunOptions, part: str, name: str) -> object:
    return getattr(getattr(options, part), name)
