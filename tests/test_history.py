"""Claims about a run's recorded history: it comes back as it was, and digests are those of states that were saved."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dwiml_func import EpochReport, init_state, save, sgd
from dwiml_func.checkpoint import history as module
from dwiml_func.checkpoint.checkpoint import read, write
from dwiml_func.checkpoint.history import fill_digests, history_from_json, history_to_json, last_saved
from dwiml_func.core.early_stopping import Best
from dwiml_func.core.report import Validation

FLOATS = st.floats() | st.sampled_from([0.1 + 0.2, 5e-324, -0.0, math.nan, math.inf])
METRICS = st.dictionaries(st.text(max_size=8), FLOATS, max_size=3)
REPORTS = st.builds(
    EpochReport,
    epoch=st.integers(0, 2**70),
    learning_rate=FLOATS,
    train=METRICS,
    valid=METRICS,
    num_batches=st.integers(0, 2**40),
    num_points=FLOATS,
    best=st.builds(Best, FLOATS, st.none() | st.integers(1, 9), st.integers(0, 9)),
    is_best=st.booleans(),
    stop=st.sampled_from([None, "max_epochs", "patience"]),
    train_minutes=FLOATS,
    valid_minutes=FLOATS,
    digest=st.none() | st.just("0" * 64),
    batch=st.integers(0, 2),
    monitor=st.sampled_from(["loss", "mean_l2"]),
    validations=st.lists(st.builds(Validation, st.integers(1, 9), METRICS, FLOATS), max_size=2).map(tuple),
)


@settings(max_examples=30)
@given(st.lists(REPORTS, max_size=3))
def test_every_bit_comes_back_through_json_text(history):
    read = history_from_json(json.loads(json.dumps(history_to_json(history))))
    assert repr(read) == repr(tuple(history))  # as text: NaN is not equal to itself, and -0.0 equals 0.0


def test_what_is_no_report_is_an_error():
    (data,) = history_to_json([report(1)])
    assert not {"batch", "monitor", "validations"} & {*data}  # which came later: old histories keep their bytes
    without = {name: value for name, value in data.items() if name != "epoch"}
    for bad in ({**data, "colour": 1}, without):
        with pytest.raises(TypeError):
            history_from_json([bad])


def report(epoch: int, digest: str | None = None, **changes: Any) -> EpochReport:
    values = EpochReport(
        epoch=epoch,
        learning_rate=0.1,
        train={"loss": math.nan, "grad_norm": 1.0},
        valid={},
        num_batches=3,
        num_points=30.0,
        best=Best(),
        is_best=False,
        stop=None,
        train_minutes=0.1,
        valid_minutes=0.0,
        digest=digest,
    )
    return replace(values, **changes)


def digests(history: tuple[EpochReport, ...]) -> list[str | None]:
    return [entry.digest for entry in history]


def test_digests_of_before_stay_and_the_new_one_is_added():
    earlier = (report(1, "a"), report(2, "b"))
    assert digests(fill_digests((report(1), report(2), report(3)), earlier, 3, "c")) == ["a", "b", "c"]
    assert digests(fill_digests((report(1, "a"), report(2, "b"), report(3)), (), 3, "c")) == ["a", "b", "c"]


def test_within_an_epoch_no_report_gets_the_digest_of_the_state():
    assert digests(fill_digests((report(1), report(2)), (report(1, "a"),), 2, None)) == ["a", None]


def test_an_epoch_that_came_out_otherwise_does_not_get_the_digest_of_the_earlier_one():
    """As after resuming from an older checkpoint with other options."""
    earlier = (report(1, "a"), report(2, "b"), report(3, "c"))
    again = (report(1), report(2, learning_rate=0.2), report(3))
    assert digests(fill_digests(again, earlier, 9, None)) == ["a", None, "c"]
    assert digests(fill_digests((report(2), report(3)), earlier, 9, None)) == [None, None]  # other places


def test_the_state_that_is_saved_counts_more_than_what_was_recorded():
    assert digests(fill_digests((report(1, "old"),), (report(1, "older"),), 1, "new")) == ["new"]
    assert digests(fill_digests((report(1, "own"), report(2)), (report(1, "older"),), 2, "new")) == ["own", "new"]


def test_what_is_remembered_of_reports_is_forgotten_before_it_fills_the_memory(monkeypatch):
    monkeypatch.setattr(module, "_MAX_REMEMBERED", 3)
    memo, reports = module._Memo(), [report(epoch) for epoch in range(1, 6)]
    for number, each in enumerate(reports):
        assert memo.get(each) is None
        assert memo.put(each, number) == memo.get(each) == number
    assert [memo.get(each) for each in reports] == [None, None, None, 3, 4]


def test_a_save_does_not_make_the_same_reports_text_again(tmp_path, monkeypatch):
    """What a save does for the epochs before it is counted in reports, not in seconds."""
    state, made = init_state(torch.nn.Linear(1, 1), sgd(), seed=0), []
    to_json = module.history_to_json
    monkeypatch.setattr(module, "history_to_json", lambda reports: made.extend(reports) or to_json(reports))
    history = tuple(report(epoch) for epoch in range(1, 21))
    save(tmp_path, state.replace(epoch=20), history)
    for epoch in (21, 22, 23):
        made.clear()
        history = (*history, report(epoch))  # a script's own, without the digests
        save(tmp_path, state.replace(epoch=epoch), history)
        assert [each.epoch for each in made] == [epoch]
    saved = read(tmp_path).history
    assert [each.digest is not None for each in saved] == [False] * 19 + [True] * 4
    assert repr(tuple(replace(each, digest=None) for each in saved)) == repr(history)  # NaN is not equal to itself


def test_what_was_saved_last_is_known_until_anybody_writes_there(tmp_path, monkeypatch):
    state = init_state(torch.nn.Linear(1, 1), sgd(), seed=0)
    monkeypatch.chdir(tmp_path)
    manifest = save("run", state.replace(epoch=1), [report(1)]) / "manifest.json"
    for place in ("run", tmp_path / "run"):
        found = last_saved(place)
        assert found is not None
        assert [each.epoch for each in found] == [1]
    os.utime(manifest, ns=(0, 0))  # other bytes in the same file
    assert last_saved("run") is None
    save("run", state.replace(epoch=2), [report(1), report(2)])
    for epoch in (1, 2):  # nor is one of two that cannot be read taken for the other
        (tmp_path / "other" / "checkpoint" / str(epoch)).mkdir(parents=True)
    assert last_saved("other") is None
    (tmp_path / "run" / "checkpoint" / "3").mkdir()
    assert last_saved("run") is None


def test_a_checkpoint_that_another_process_wrote_is_read_by_the_next_save(tmp_path):
    state = init_state(torch.nn.Linear(1, 1), sgd(), seed=0)
    save(tmp_path, state.replace(epoch=1), [report(1)])
    digest = "f" * 64
    both = [replace(report(1), digest=digest), report(2)]
    write(tmp_path, state.replace(epoch=2), both, config={}, data={}, environment=None)
    save(tmp_path, state.replace(epoch=3), [report(1), report(2), report(3)])
    assert read(tmp_path).history[0].digest == digest
