"""Whether the checkpoints, the config and the best model of a run agree, and one hash of the whole run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dwiml_func._checks import at_most_three
from dwiml_func.checkpoint.arrays import load_leaves
from dwiml_func.checkpoint.checkpoint import Checkpoint, read
from dwiml_func.checkpoint.digest import leaf_digest
from dwiml_func.checkpoint.index import best_name, list_checkpoints, position_of
from dwiml_func.checkpoint.manifest import CheckpointError, CorruptError, read_manifest
from dwiml_func.core.report import EpochReport
from dwiml_func.core.weights import with_eval_params
from dwiml_func.experiment.comparison.compare import differences, differing, report_differences, report_values
from dwiml_func.experiment.config import RunConfig
from dwiml_func.experiment.model_store import MANIFEST
from dwiml_func.experiment.optimizers import configured_optimizer
from dwiml_func.experiment.record import may_change, with_defaults
from dwiml_func.files.fingerprint import content

__all__ = ["best_model_problems", "record_digest", "record_problems"]

_LABELS = ("there", "in the newest checkpoint")


def record_digest(latest: Checkpoint) -> str:
    """SHA-256 of all that a run recorded of its results: data, config, and the epochs as a chain of hashes.

    Each link is the hash of the link before it, of the epoch's report and of the digest of its state; durations apart,
    so a run that is repeated has the same. Options that cannot change results are left out.
    """
    has_shards = _has_shards(latest.config)
    config = {
        name: text
        for name, (text, _) in differing(latest.config, {}).items()
        if not _is_free(name, has_shards) or name == "training.skip_batches"
    }
    link = _sha256({"data": content(latest.data), "config": config})
    for report in latest.history:
        link = _sha256({"before": link, "report": report_values(report), "digest": report.digest})
    return link


def record_problems(directory: Path, latest: Checkpoint, config: RunConfig) -> list[str]:
    """Where the checkpoints of a run contradict each other or `config.json`, or do not hold what they say."""
    problems, named = list(latest.corrupt.values()), config.to_dict()
    for name in list_checkpoints(directory):
        if name in latest.corrupt:
            continue
        try:
            checkpoint = read(directory, name)
            _ = checkpoint.state
        except CorruptError as error:
            problems.append(str(error))
            continue
        found = [
            *_differing_options(with_defaults(checkpoint.config), named),
            *_history_problems(checkpoint, latest.history),
        ]
        if latest.data and checkpoint.data and "sha256" in checkpoint.data:
            found += [f"data.{text}" for text in differences(content(checkpoint.data), content(latest.data), _LABELS)]
        problems += [f"checkpoint {name}: {text}" for text in found]
    return problems


def best_model_problems(directory: Path, latest: Checkpoint, config: RunConfig) -> list[str]:
    """Where the best model does not have the parameters of the best epoch's checkpoint."""
    best = best_name(latest.state.best)
    if best is None or best not in list_checkpoints(directory):
        return []
    try:
        leaves = load_leaves(directory / "best_model", read_manifest(directory / "best_model", MANIFEST))
        state = with_eval_params(read(directory, best).state, configured_optimizer(config.training))
    except (CheckpointError, FileNotFoundError) as error:
        return [f"best model: {error}"]
    expected = {**state.params, **state.buffers}
    different = [name for name in leaves.keys() | expected.keys() if not _is_same(leaves.get(name), expected.get(name))]
    return (
        [f"best model: {at_most_three(sorted(different), ', ')} are not those of checkpoint {best}"]
        if different
        else []
    )


def _is_same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and leaf_digest(a) == leaf_digest(b)


def _differing_options(recorded: Mapping[str, Any], named: Mapping[str, Any]) -> list[str]:
    pairs = differing(recorded, named).items()
    has_shards = _has_shards(named)
    return [
        f"{name}: {there} there, {here} in config.json"
        for name, (there, here) in pairs
        if not _is_free(name, has_shards)
    ]


def _has_shards(config: Mapping[str, Any]) -> bool:
    return config.get("training", {}).get("num_shards", 1) != 1


def _is_free(name: str, has_shards: bool) -> bool:
    """Whether an option may differ between the checkpoints of a run; the data are compared, wherever they are."""
    return may_change(name, has_shards=has_shards) or name == "hdf5_file"


def _history_problems(checkpoint: Checkpoint, history: Sequence[EpochReport]) -> list[str]:
    """How the epochs that a checkpoint records differ from those of the newest."""
    own = {report.epoch: report for report in checkpoint.history}
    later = {report.epoch: report for report in history}
    found = []
    for epoch, report in own.items():
        if report.batch:
            continue
        if epoch not in later:
            found.append(f"epoch {epoch} is not in the newest checkpoint")
            continue
        found += [f"epoch {epoch}: {text}" for text in report_differences(report, later[epoch], _LABELS)]
        if report.digest is not None and report.digest != later[epoch].digest:
            found.append(f"epoch {epoch}: digest {report.digest} there, {later[epoch].digest} in the newest checkpoint")
    end = position_of(checkpoint.name)[0]
    if missing := set(range(1, end + 1)) - own.keys():
        found.append(f"epoch {min(missing)} is left out of its history")
    if "-" not in checkpoint.name and end in own and own[end].digest not in (None, checkpoint.digest):
        found.append(f"digest of its state {checkpoint.digest}, recorded {own[end].digest}")
    return found


def _sha256(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
