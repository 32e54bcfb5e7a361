"""Pictures of experiments, from what their snapshots have on record."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dwiml_func.checkpoint.index import newest_record
from dwiml_func.comparison import distinguishing
from dwiml_func.config import RunConfig
from dwiml_func.experiment import read_config
from dwiml_func.writers.evaluation_json import read_evaluation
from dwiml_func.writers.plots import PlottedRun, plot_runs, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_experiments", "leave_picture"]

_MOST = 4  # options that a label names
_log = logging.getLogger(__name__)


def draw_experiments(directories: Sequence[str | Path]) -> Figure:
    """Draw experiments over each other; each is labelled with its name and the options that it alone does not share.

    Args:
        directories: the experiments.

    Returns:
        The figure, see `plot_runs`.

    Raises:
        FileNotFoundError: one is no experiment.
        ValueError: one has no finished epoch yet, or is damaged.

    Example:
        >>> draw_experiments(["/no/such/experiment"])
        Traceback (most recent call last):
        ...
        FileNotFoundError: '/no/such/experiment' is not an experiment: it has no config.json.
    """
    paths = [Path(directory) for directory in directories]
    configs = [read_config(path) for path in paths]
    options = distinguishing([replace(config, origin=None).to_dict() for config in configs])
    runs = []
    for path, config, own in zip(paths, configs, options, strict=True):
        record = newest_record(path)
        if record is None or not record.history:
            raise ValueError(f"{str(path)!r} has no finished epoch on record yet: there is nothing to draw.")
        for sentence in record.damaged:
            _log.warning("%s Drawn from %s.", sentence, record.name)
        runs.append(
            PlottedRun(label=_label(path, config, own), history=record.history, evaluation=read_evaluation(path))
        )
    return plot_runs(runs)


def _label(directory: Path, config: RunConfig, options: Mapping[str, str]) -> str:
    named = [f"{name.rpartition('.')[2]} {value}" for name, value in options.items() if name != "hdf5_file"]
    if "hdf5_file" in options:
        named.append(Path(options["hdf5_file"]).name)
    if len(named) > _MOST:
        named[_MOST:] = [f"and {len(named) - _MOST} more"]
    if config.origin is not None:
        named.insert(0, f"forked from {Path(config.origin.experiment).name} at {config.origin.snapshot}")
    name = directory.resolve().name
    return f"{name}: {', '.join(named)}" if named else name


def leave_picture(directory: Path) -> None:
    """Draw an experiment into its `plots/training.png`. A failure costs a warning and nothing else.

    Args:
        directory: the experiment.

    Example:
        >>> leave_picture(Path("/no/such/experiment"))
    """
    try:
        figure = draw_experiments([directory])
        (directory / "plots").mkdir(exist_ok=True)
        save_figure(figure, directory / "plots" / "training.png")
    except Exception as error:
        _log.warning("No picture of %s was drawn: %s", directory, error)
