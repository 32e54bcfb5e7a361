"""How runs that are shown side by side are told apart: the options that differ and can matter, and what a loss is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dwiml_func.experiment.comparison.compare import distinguishing
from dwiml_func.models.config import GETTER_OPTIONS

__all__ = ["kind_names", "loss_kind", "run_labels", "run_names"]

_NO_MATTER = ("checkpoints.", "logging.", "origin")
_SAME_RESULTS = {
    *("data.lazy", "data.cache_size", "batches.processes", "batches.batch_size_validation"),
    *("training.num_threads", "training.skip_window_lag"),
}
"""Options that cannot change results, apart from rounding."""
_FIRST = ("model.model", "model.dg_key", "training.learning_rate")
_MAX_OPTIONS = 4  # that a label names
_MAX_LETTERS = 30  # of an option's value in a label
_OF_LENGTHS = {"l2-regression", "cosine-plus-l2-regression", "gaussian", "gaussian-mixture"}
"""Getters whose loss depends on the lengths of the steps."""


def run_names(directories: Sequence[Path]) -> list[str]:
    """The names of runs; those of one name, and members of ensembles, with the folder that they are in."""
    resolved = [path.resolve() for path in directories]
    names = [path.name for path in resolved]
    return [
        f"{path.parent.name}/{path.name}" if names.count(path.name) > 1 or path.name.isdecimal() else path.name
        for path in resolved
    ]


def run_labels(directories: Sequence[Path], configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """A label for each of these runs: its name, and options that not all share and that can change results.

    It names model, direction getter and learning rate first, then the options that tell the most runs apart.
    """
    options = [
        {name: value for name, value in own.items() if _matters(name)}
        for own in distinguishing([{**config, "origin": None, "padded_lengths": None} for config in configs])
    ]
    order = _in_order(options)
    return [
        _label(name, path, config, {key: own[key] for key in order})
        for name, path, config, own in zip(run_names(directories), directories, configs, options, strict=True)
    ]


def _in_order(options: Sequence[Mapping[str, str]]) -> list[str]:
    """The names of options: each tells the most runs apart that those before it do not."""
    left = list(options[0]) if options else []
    chosen = [name for name in _FIRST if name in left]
    left = [name for name in left if name not in chosen]
    while left:
        best = max(left, key=lambda name: len({tuple(own[key] for key in (*chosen, name)) for own in options}))
        chosen.append(best)
        left.remove(best)
    return chosen


def loss_kind(config: Mapping[str, Any]) -> dict[str, str]:
    """What the loss of a config is: losses are comparable where this is equal. Empty for the run of a script."""
    model, batches = config.get("model"), config.get("batches")
    if not isinstance(model, Mapping) or not isinstance(batches, Mapping):
        return {}
    lengths = {name: batches.get(name) for name in ("step_size", "nb_points", "compress")}
    if model.get("model") == "autoencoder":
        own = {"model": "autoencoder", "reconstruction_loss": model.get("reconstruction_loss"), **lengths}
    else:
        own = {"dg_key": model.get("dg_key"), **{name: model.get(name) for name in GETTER_OPTIONS}}
        own.pop("dg_dropout", None)
        own |= lengths if own["dg_key"] in _OF_LENGTHS and own["normalize_targets"] is None else {}
    return {name: str(value) for name, value in own.items() if value not in (None, False)}


def kind_names(kinds: Sequence[Mapping[str, str]]) -> list[str]:
    """A name for each of several kinds of loss: the direction getter, and what tells it from others of that getter."""
    names = []
    for kind in kinds:
        first, *_ = [*kind.values(), "loss"]
        alike = [other for other in kinds if [*other.values()][:1] == [*kind.values()][:1]]
        differing = [key for key in kind if any(other.get(key) != kind[key] for other in alike)]
        plain = [f"without {key}" for other in alike for key in other if key not in kind]
        names.append(", ".join([first, *(f"{key} {kind[key]}" for key in differing), *dict.fromkeys(plain)]))
    return names


def _matters(name: str) -> bool:
    return name not in _SAME_RESULTS and not name.startswith(_NO_MATTER)


def _label(name: str, directory: Path, config: Mapping[str, Any], options: Mapping[str, str]) -> str:
    named = [f"{key.rpartition('.')[2]} {_short(value)}" for key, value in options.items() if key != "hdf5_file"]
    if "hdf5_file" in options:
        named.append(Path(options["hdf5_file"]).name)
    if len(named) > _MAX_OPTIONS:
        named[_MAX_OPTIONS:] = [f"and {len(named) - _MAX_OPTIONS} more"]
    if (directory / "config.json").is_file() and (origin := config["origin"]) is not None:
        source, at = Path(origin["experiment"]).name, origin["checkpoint"]
        named.insert(0, f"initialized from {source}" if origin["weights_only"] else f"forked from {source} at {at}")
    return f"{name}: {', '.join(named)}" if named else name


def _short(value: str) -> str:
    return value if len(value) <= _MAX_LETTERS else f"{value[: _MAX_LETTERS - 3]}..."
