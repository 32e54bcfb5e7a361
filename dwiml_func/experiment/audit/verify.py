"""Training a recorded epoch of an experiment again, and comparing it bitwise. Nothing is written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dwiml_func.checkpoint.checkpoint import Checkpoint
from dwiml_func.checkpoint.index import position_of
from dwiml_func.checkpoint.provenance import environment, environment_differences, environment_of
from dwiml_func.core.loop import train_and_validate
from dwiml_func.core.loop_options import Track
from dwiml_func.core.non_finite import NonFiniteError
from dwiml_func.core.report import EpochReport
from dwiml_func.core.state import TrainState
from dwiml_func.experiment.audit.consistency import best_model_problems
from dwiml_func.experiment.audit.replay import (
    NothingLeft,
    Verification,
    checkpoint_after,
    recorded_run,
    recorded_threads,
    replay_problems,
    replay_start,
    start_problems,
)
from dwiml_func.experiment.comparison.compare import differences, report_values
from dwiml_func.experiment.config import RunConfig
from dwiml_func.experiment.folder import is_ensemble, read_config
from dwiml_func.experiment.record import with_defaults
from dwiml_func.experiment.resume import with_new_options
from dwiml_func.experiment.setup import RunParts, prepare
from dwiml_func.experiment.tracking.lag_validation import without_window_lag
from dwiml_func.experiment.training_config import WINDOW_LAG
from dwiml_func.files.fingerprint import content, fingerprint, linked_paths

__all__ = ["data_problems", "train_epochs", "verify_epoch"]

_MEMBER = "member of an ensemble: its common step is not bitwise identical to the step of a single run"


def verify_epoch(
    directory: str | Path,
    *,
    epoch: int | None = None,
    hdf5_file: str | None = None,
    track: Track | None = None,
) -> Verification:
    """Train an epoch, by default the last one, again from the nearest checkpoint before it, and compare.

    Compared with what was recorded are the state's digest, every metric, the digest of the state from which the replay
    began, the checkpoint after the epoch, where there is one, the data file, and the best model with its checkpoint.
    The config is that of `config.json`, the number of threads is the recorded one. `hdf5_file` is the path of a dataset
    that was moved.

    ValueError where the epoch is not recorded, or nothing is left to replay it from.
    """
    directory = Path(directory)
    config = read_config(directory)
    latest, reports = recorded_run(directory)
    epoch = max(reports) if epoch is None else epoch
    if epoch in reports:
        _check_epochs_of_origin(config, epoch)
    replayed_config = with_new_options(config, hdf5_file=hdf5_file)
    after, corrupt = checkpoint_after(directory, epoch, reports)
    if WINDOW_LAG not in reports[epoch].valid:  # of an earlier version, or an ensemble's member
        replayed_config = without_window_lag(replayed_config)

    problems = list(latest.corrupt.values())
    problems += [problem for problem in corrupt if problem not in problems]
    recorded_environment = (after or latest).environment
    changed_config = differences(with_defaults(latest.config), config.to_dict(), ("recorded", "in config.json"))
    other_data = data_problems(latest, replayed_config.hdf5_file)
    other_model = best_model_problems(directory, latest, config)
    with recorded_threads(recorded_environment, default=config.training.num_threads):
        now, start, is_replayed = environment(recorded_environment.get("devices", ())), None, False
        try:
            parts = prepare(replayed_config)
            first = parts.first_state()
            now = environment_of(first)
            state, start, corrupt = replay_start(directory, first, epoch, config.origin)
            problems += corrupt
            problems += start_problems(state, start, reports, config.origin)
            problems += replay_problems(train_epochs(state, parts, track, epoch), reports, epoch, after)
            is_replayed = True
        except (ValueError, NonFiniteError) as error:
            if isinstance(error, NothingLeft) or not (other_data or changed_config or problems):
                raise
            problems.append(f"the replay failed: {error}")
    return Verification(
        epoch=epoch,
        is_replayed=is_replayed,
        start=start,
        digest=reports[epoch].digest,
        num_values=len(report_values(reports[epoch])),
        problems=(*problems, *other_data, *other_model),
        context=(
            *(f"environment: {text}" for text in environment_differences(recorded_environment, now)),
            *(f"config: {text}" for text in changed_config),
            *((_MEMBER,) if problems and is_ensemble(directory.parent) else ()),
        ),
    )


def _check_epochs_of_origin(config: RunConfig, epoch: int) -> None:
    if config.origin is None:
        return
    forked = position_of(config.origin.checkpoint)[0]
    if epoch <= forked:
        raise ValueError(
            f"Epoch {epoch} was trained before this run was forked after epoch {forked}. "
            f"Verify it in {config.origin.experiment}."
        )


def train_epochs(
    state: TrainState, parts: RunParts, track: Track | None, epoch: int
) -> Iterator[tuple[TrainState, EpochReport]]:
    """Train a run from a state to the end of an epoch."""
    # Without patience: the recorded run went that far.
    return train_and_validate(state, **parts.loop_options, max_epochs=epoch, track=track)


def data_problems(latest: Checkpoint, hdf5_file: str) -> list[str]:
    """How the bytes of a dataset differ from those that were recorded; FileNotFoundError where it is missing."""
    if not latest.data:
        return []
    if not Path(hdf5_file).is_file():
        raise FileNotFoundError(f"No dataset {hdf5_file}. If it was moved, give its path (--hdf5-file).")
    found = content(fingerprint(hdf5_file, linked_paths(latest.data, hdf5_file)))
    recorded = content(latest.data)
    lines = differences(recorded, {name: found[name] for name in recorded}, ("recorded", "now"))
    return [f"data file {hdf5_file}: {text}" for text in lines]
