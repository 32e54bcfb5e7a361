"""Claims about audits: an honest run passes, each kind of forgery is found, and what was left out is named."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from forgeries import FORGERIES, PHANTOM, forged, train

from dwiml_func.checkpoint.checkpoint import newest
from dwiml_func.checkpoint.index import list_checkpoints
from dwiml_func.checkpoint.retention import remove_old
from dwiml_func.cli import verify
from dwiml_func.cli.verify import format_audit
from dwiml_func.core.non_finite import NonFiniteError
from dwiml_func.data.example.bundles import load_bundles
from dwiml_func.data.processes import in_processes
from dwiml_func.experiment.audit import consistency
from dwiml_func.experiment.audit import ensemble as audit_of_ensembles
from dwiml_func.experiment.audit.audit import (
    Audit,
    Replayed,
    Span,
    audit_experiment,
    replayed,
    sample_epochs,
    spans,
    summed_up,
)
from dwiml_func.experiment.audit.consistency import best_model_problems, record_digest, record_problems
from dwiml_func.experiment.audit.ensemble import _member_problems, _read_members, _replays, audit_ensemble
from dwiml_func.experiment.audit.replay import NothingLeft
from dwiml_func.experiment.config import CheckpointConfig, LoggingConfig, RunConfig
from dwiml_func.experiment.folder import read_config, read_ended
from dwiml_func.experiment.training_config import WINDOW_LAG


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("audit"))


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def test_every_epoch_is_trained_again_in_two_processes_and_nothing_is_written(cli, run):
    before = contents(run)
    outcome = cli("verify", run, "--all", "-j", "2")
    assert (outcome.code, outcome.err) == (0, "")
    first, last = outcome.out.splitlines()
    assert first == f"{run}: 4 of 4 epochs trained again, bitwise identical to what was recorded."
    assert re.fullmatch("SHA-256 of the run: [0-9a-f]{64}", last)
    assert contents(run) == before
    latest = newest(run)
    assert latest
    records = [
        record_digest(replace(latest, config={**latest.config, "training": {**latest.config["training"], **change}}))
        for change in ({}, {"max_epochs": 99}, {"skip_batches": ["9-1"]})
    ]
    assert last == f"SHA-256 of the run: {records[0]}"
    assert records[0] == records[1] != records[2]  # how long is no part of the results, which batches are


@pytest.mark.parametrize("kind", FORGERIES)
def test_a_forged_record_with_new_digests_is_found(run, tmp_path, kind):
    copied, what = forged(run, tmp_path, kind, random.Random(3))
    audit = audit_experiment(copied)
    assert audit.problems, what
    latest, honest = newest(copied), newest(run)
    assert latest
    assert honest
    assert not latest.corrupt
    assert audit.record == record_digest(latest) != record_digest(honest)


def test_several_processes_find_what_one_finds(run, tmp_path):
    copied, _ = forged(run, tmp_path, "weights", random.Random(3))
    one, two = (audit_experiment(copied, num_processes=number) for number in (1, 2))
    assert set(one.problems) == set(two.problems) != set()


def test_a_sample_bounds_the_share_of_forged_epochs(cli, run):
    outcome = cli("verify", run, "--sample", "3", "-j", "1")
    assert outcome.code == 0
    assert "3 of 4 epochs trained again, bitwise identical to what was recorded." in outcome.out
    assert "at most (1 - f)^3: 0.97 for 1%, 0.86 for 5%, 0.73 for 10%, 0.12 for 50%." in outcome.out
    drawn = {tuple(sample_epochs(range(1, 41), 3)) for _ in range(20)}
    assert len(drawn) > 10


def test_a_forged_epoch_is_missed_by_samples_at_the_rate_that_is_printed():
    num_epochs, num_forged, sample, rounds = 40, 4, 6, 4000
    misses = sum(min(sample_epochs(range(1, num_epochs + 1), sample)) > num_forged for _ in range(rounds))
    assert misses / rounds < (1 - num_forged / num_epochs) ** sample + 0.03  # four standard deviations


def test_epochs_without_checkpoints_between_them_are_trained_in_one_go(cli, run, tmp_path):
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    for name in ("1", "2"):
        shutil.rmtree(copied / "checkpoint" / name)
    outcome = cli("verify", copied, "--all")
    assert outcome.code == 0
    assert "4 of 4 epochs trained again, bitwise identical to what was recorded." in outcome.out
    assert "Epochs 1 to 3 have no checkpoint between them, so one process trained them in one go." in outcome.out


@pytest.mark.parametrize("kind", ["metric", "tail"])
def test_a_forged_epoch_between_two_checkpoints_is_found(run, tmp_path, kind):
    copied, what = forged(run, tmp_path, kind, random.Random(4))
    latest = newest(copied)
    assert latest
    remove_old(copied, latest.state, "every:4")
    assert list_checkpoints(copied) == ["3", "4"]
    assert audit_experiment(copied).problems, what


def test_a_best_model_of_other_weights_is_found(run, tmp_path):
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    (tmp_path / "other").mkdir()
    other, _ = forged(run, tmp_path / "other", "tail", random.Random(3))
    shutil.rmtree(copied / "best_model")
    shutil.copytree(other / "best_model", copied / "best_model")
    (problem,) = audit_experiment(copied).problems
    assert re.fullmatch(r"best model: .+ and \d+ more are not those of checkpoint 4", problem)


def test_a_corrupt_checkpoint_is_found_and_the_epochs_around_it_are_trained(run, tmp_path):
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    manifest = copied / "checkpoint" / "2" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"step": ', '"step": 1'))
    audit = audit_experiment(copied)
    assert audit.problems == (f"{manifest.parent} is corrupt: manifest.json does not hold what was written.",)
    assert audit.replayed == (1, 2, 3, 4)


def test_a_fork_is_audited_from_where_it_was_forked(cli, run, tmp_path):
    source = Path(shutil.copytree(run, tmp_path / "source"))
    assert (
        cli("fork", source, "forked", "--from", "2", "--learning-rate", "0.01", "--quiet", "--skip-figures").code == 0
    )
    outcome = cli("verify", tmp_path / "forked", "--all", "-j", "1")
    assert outcome.code == 0
    assert "2 of 2 epochs trained again" in outcome.out
    assert f"Not audited: epochs 1 to 2: trained before the fork. Audit {source}." in outcome.out
    shutil.rmtree(tmp_path / "forked" / "checkpoint" / "2")
    outcome = cli("verify", tmp_path / "forked", "--all", "-j", "1")
    assert outcome.code == 0
    assert "1 of 2 epochs trained again" in outcome.out
    assert "Not audited: epoch 3: " in outcome.out


def test_data_are_compared_where_both_checkpoints_have_recorded_them(run):
    latest = newest(run)
    assert latest is not None
    other = {**latest.data, "sha256": "0" * 64}
    found = [record_problems(run, replace(latest, data=data), read_config(run)) for data in (latest.data, {}, other)]
    assert found[:2] == [[], []]
    assert all("data.sha256" in text for text in found[2])
    assert len(found[2]) == len(list_checkpoints(run))


def test_a_best_model_whose_checkpoint_was_removed_is_compared_with_none(run, tmp_path):
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    latest, config = newest(copied), read_config(copied)
    assert latest is not None
    assert best_model_problems(copied, latest, config) == []
    shutil.rmtree(copied / "checkpoint" / str(latest.state.best.epoch))
    assert best_model_problems(copied, latest, config) == []


def reports_of(text: str) -> list[Any]:
    """Reports by epoch, value and digest, such as 1a0 (epoch 1, value a, digest 0); with + after a part of an epoch."""
    return [
        SimpleNamespace(epoch=int(each[0]), value=each[1], digest=each[2].strip("-") or None, batch=int("+" in each))
        for each in text.split()
    ]


@pytest.mark.parametrize(
    ("name", "digest", "own", "latest", "problems"),
    [
        ("2", "y", "1ax 2by", "1ax 2by 3cz", []),
        ("2", "y", "1a- 2b-", "1ax 2by", []),  # an earlier version recorded no digests
        ("2", "y", "1ax 2by", "1ax 2cy", ["epoch 2: b there, c in the newest checkpoint"]),
        ("2", "y", "1aw 2by", "1ax 2by", ["epoch 1: digest w there, x in the newest checkpoint"]),
        ("2", "y", "1ax 2by", "1ax", ["epoch 2 is not in the newest checkpoint"]),
        ("2", "y", "2by", "1ax 2by", ["epoch 1 is left out of its history"]),
        ("3", "z", "1ax", "1ax 2by 3cz", ["epoch 2 is left out of its history"]),
        ("2", "z", "1ax 2by", "1ax 2by", ["digest of its state z, recorded y"]),
        ("2-3", "z", "1ax 2by", "1ax 2by", []),
        ("1-3", "z", "1ax 2qq+", "1ax 2by", []),
        ("1", "x", "1ax", "1ax", []),
    ],
)
def test_the_history_of_a_checkpoint_begins_that_of_the_newest(monkeypatch, name, digest, own, latest, problems):
    def differences(a: Any, b: Any, labels: tuple[str, str]) -> list[str]:
        return [] if a.value == b.value else [f"{a.value} {labels[0]}, {b.value} {labels[1]}"]

    monkeypatch.setattr(consistency, "report_differences", differences)
    checkpoint: Any = SimpleNamespace(name=name, digest=digest, history=reports_of(own))
    assert consistency._history_problems(checkpoint, reports_of(latest)) == problems


@pytest.mark.parametrize(
    ("change", "same_digest"),
    [
        ({}, True),
        ({"config": {"training": {"num_threads": 2}}}, False),
        ({"config": {"hdf5_file": "/moved.hdf5"}}, True),
        ({"config": {"batches": {"processes": 3}}}, True),
        ({"config": {"model": {"dropout": 0.5}}}, False),
        ({"config": {"training": {"skip_batches": ["1:1"]}}}, False),
        ({"data": {"sha256": "other", "size": 3}}, False),
        ({"data": {"sha256": "a", "size": 3, "mtime": 99}}, True),
    ],
)
def test_the_digest_of_a_record_is_of_what_results_depend_on(run, change, same_digest: bool) -> None:
    latest = newest(run)
    assert latest is not None
    config = {part: dict(own) if isinstance(own, dict) else own for part, own in latest.config.items()}
    for part, own in change.get("config", {}).items():
        config[part] = config[part] | own if isinstance(own, dict) else own
    data = {"sha256": "a", "size": 3, "mtime": 1}
    before = record_digest(replace(latest, data=data))
    assert (record_digest(replace(latest, config=config, data=change.get("data", data))) == before) is same_digest
    first, second, *others = latest.history
    for history in ((second, first, *others), (first, *others), (replace(first, digest="00"), second, *others)):
        assert record_digest(replace(latest, data=data, history=history)) != before
    slower = replace(first, train_minutes=first.train_minutes + 1)
    assert record_digest(replace(latest, data=data, history=(slower, second, *others))) == before


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("ensemble"), "ensemble", epochs=2)


@pytest.mark.parametrize("measured", [0, 1, 2])
def test_an_ensemble_measures_the_window_lag_again_where_one_of_its_reports_has_it(ensemble, monkeypatch, measured):
    configs = []

    def made_of(given):
        configs.extend(given)
        raise InterruptedError

    members = [replace(each, reports={1: replace(each.reports[1], valid={})}) for each in _read_members(ensemble, None)]
    for number in range(measured):
        valid = {WINDOW_LAG: 2.0}
        members[number] = replace(members[number], reports={1: replace(members[number].reports[1], valid=valid)})
    monkeypatch.setattr(audit_of_ensembles, "_read_members", lambda *_: members)
    monkeypatch.setattr(audit_of_ensembles, "prepare_ensemble", made_of)
    with pytest.raises(InterruptedError):
        list(_replays(ensemble, None, []))
    assert [each == own.config for each, own in zip(configs, members, strict=True)] == [measured > 0] * 2


def test_an_ensemble_is_audited_with_all_its_members_and_a_member_is_not(cli, ensemble):
    before = contents(ensemble)
    outcome = cli("verify", ensemble, "--all", "-j", "2")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith(
        f"{ensemble}: 2 of 2 epochs trained again, bitwise identical to what was recorded.\nSHA-256 of the run: "
    )
    assert contents(ensemble) == before
    cli("verify", ensemble / "1", "--all").check_refusal(
        "is a member of an ensemble, whose step trains all members at once", f"verify {ensemble} --all"
    )


@pytest.mark.parametrize("kind", ["metric", "config", "data"])
def test_a_member_with_a_forged_record_is_found(ensemble, tmp_path, kind):
    copied, what = forged(ensemble, tmp_path, kind, random.Random(3))
    audit = audit_ensemble(copied)
    assert audit.problems, what
    assert audit.record != audit_ensemble(ensemble, sample=1).record


def test_members_that_failed_or_stopped_early_are_replayed_as_far_as_they_went(cli, tmp_path):
    options = ("--rnn-layer-sizes", "4", "--batch-size-training", "48", "--max-epochs", "3", "--keep", "every:2")
    sweep = ("--sweep", "learning-rate=0.01,0.3*1 1e30,1e38,1e-30", "--patience", "2", "--skip-window-lag")
    assert cli("train", tmp_path, "run", PHANTOM, *options, *sweep, "--quiet").code == 0
    assert read_ended(tmp_path / "run")[1].keys() >= {1, 2}
    assert audit_ensemble(tmp_path / "run").replayed == (1, 2, 3)
    assert audit_ensemble(tmp_path / "run").problems == ()


@pytest.mark.parametrize(
    ("stops", "failed", "is_problem"),
    [
        *((None, {}, True), ([], {}, True), (["patience", None], {}, True), ([None, "patience"], {}, False)),
        *((None, {0: "nan"}, False), ([], {1: "nan"}, True)),
    ],
)
def test_a_member_without_an_epochs_report_has_failed_or_stopped_before(stops, failed, is_problem) -> None:
    latest = None if stops is None else SimpleNamespace(history=[SimpleNamespace(stop=stop) for stop in stops])
    each: Any = SimpleNamespace(reports={}, latest=latest)
    ensemble: Any = None
    report: Any = SimpleNamespace(failed=failed)
    found = _member_problems(each, ensemble, 0, 3, report)
    assert found == ["the member has failed as recorded, and not when trained again"] * is_problem


def member_of(folder: Path, reports: str = "", ended: tuple[int, int] | None = None, **options: Any) -> Any:
    """The record of a member with reports of these epochs."""
    config = options.pop("config", RunConfig(hdf5_file="a.hdf5"))
    latest = options.pop("latest", SimpleNamespace(name=reports[-1:], data={}))
    epochs: Any = {int(epoch): f"report {epoch}" for epoch in reports}
    return audit_of_ensembles._Member(folder=folder, config=config, latest=latest, reports=epochs, ended=ended)


@pytest.mark.parametrize(
    ("reports", "ended", "trained"),
    [("12", None, [1, 2]), ("12", (2, 0), [1, 2]), ("12", (2, 5), [1, 2, 3]), ("1", (2, 5), [1, 3]), ("", (0, 1), [1])],
)
def test_a_member_took_steps_in_its_epochs_and_in_that_in_which_it_ended(tmp_path, reports, ended, trained) -> None:
    each = member_of(tmp_path, reports, ended)
    assert [epoch for epoch in range(1, 5) if each.trains_in(epoch)] == trained


@pytest.mark.parametrize("is_evaluated", [True, False])
def test_only_an_evaluated_member_that_is_alone_in_an_epoch_trained_by_itself(tmp_path, is_evaluated: bool) -> None:
    members = [member_of(tmp_path / str(number), reports) for number, reports in enumerate(("12", "123", "12"))]
    (tmp_path / "1").mkdir()
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "evaluation.json").touch()
    if is_evaluated:
        (tmp_path / "1" / "evaluation.json").touch()
    assert [audit_of_ensembles._only(members, epoch) for epoch in (1, 2, 3, 4)] == [None, None, 1, None]
    alone = [audit_of_ensembles._trains_alone(members, epoch) for epoch in (1, 2, 3, 4)]
    assert alone == [False, False, is_evaluated, False]
    assert not audit_of_ensembles._trains_alone([members[1]], 3)  # of an ensemble of one


def test_spans_end_where_all_that_continued_have_a_checkpoint(tmp_path, monkeypatch) -> None:
    names = {"0": ["1", "2", "2-3", "3", "5"], "1": ["1", "3", "4", "5"], "2": ["1", "2"]}
    monkeypatch.setattr(audit_of_ensembles, "list_checkpoints", lambda folder: names[folder.name])
    reports = {"0": "12345", "1": "12345", "2": "12"}
    members = [member_of(tmp_path / number, epochs) for number, epochs in reports.items()]
    assert audit_of_ensembles._ends(members) == {1, 3, 5}


def test_members_are_compared_in_what_they_share(tmp_path) -> None:
    config = RunConfig(hdf5_file="a.hdf5")
    training = replace(config.training, learning_rate=("0.1",), weight_decay=0.5, rng=7, data_rng=8)
    training = replace(training, max_epochs=3, patience=2)
    free = {"checkpoints": CheckpointConfig(keep="all"), "logging": LoggingConfig(log_every=3), "hdf5_file": "b.hdf5"}
    may = replace(config, training=training, **free)
    may_not = replace(may, model=replace(config.model, dropout=0.25), training=replace(training, clip_grad=2.0))
    of_data = SimpleNamespace(name="1", data={"sha256": "other", "mtime": 3})
    members = [member_of(tmp_path / str(number), config=own) for number, own in enumerate((config, may, may_not))]
    members.append(member_of(tmp_path / "3", latest=of_data))
    members.append(member_of(tmp_path / "4", latest=None))
    found = audit_of_ensembles._other_than_first(members)
    assert found[0] == f"member 2, model.dropout: 0.25, of the first {config.model.dropout}"
    assert [text.partition(":")[0] for text in found[1:]] == ["member 2, training.clip_grad", "member 3, sha256"]
    assert audit_of_ensembles._other_than_first(members[:2]) == []


def test_epochs_of_an_ensemble_that_nothing_leads_to_are_left_out(ensemble, tmp_path):
    copied = Path(shutil.copytree(ensemble, tmp_path / "run"))
    shutil.rmtree(copied / "1" / "checkpoint" / "1")
    [(span, replayed)] = _replays(copied, None, [Span(first=2, last=2)])
    expected = f"{span}: {copied / '1'} has no checkpoint 1."
    assert replayed == Replayed(False, left_out=(expected,))


def test_epochs_that_a_member_trained_by_itself_are_named(cli, ensemble, tmp_path):
    copied = Path(shutil.copytree(ensemble, tmp_path / "run"))
    assert cli("resume", copied, "1", "--new-max-epochs", "3", "--quiet").code == 0
    outcome = cli("verify", copied, "--all", "-j", "1")
    assert outcome.code == 0
    assert "2 of 3 epochs trained again" in outcome.out
    assert "Not audited: epoch 3: member 1 trained by itself there." in outcome.out


def test_the_text_of_a_sample_counts_the_epochs_that_were_chosen_and_shortens_many_problems():
    audit = Audit(
        recorded=tuple(range(1, 41)), replayed=(1, 2, 3, 9, 20), num_chosen=3,
        spans=(Span(first=1, last=3), Span(first=9, last=9)),
        problems=(), context=(), left_out=("epoch 41: why",), record="ab",
    )  # fmt: skip
    lines = format_audit(audit, "run").splitlines()
    assert lines[0] == "run: 5 of 40 epochs trained again, bitwise identical to what was recorded."
    assert lines[1] == "Not audited: epoch 41: why"
    assert lines[2].startswith("Epochs 1 to 3 have no checkpoint between them")
    assert lines[3].endswith("at most (1 - f)^3: 0.97 for 1%, 0.86 for 5%, 0.73 for 10%, 0.12 for 50%.")
    assert lines[4:] == ["SHA-256 of the run: ab"]
    other = format_audit(replace(audit, context=("other torch", "other numpy")), "run").splitlines()
    assert other == [*lines[:-1], "Different: other torch; other numpy", "SHA-256 of the run: ab"]
    many = replace(audit, problems=tuple(f"problem {number}" for number in range(15)), context=("other torch",))
    lines = format_audit(many, "run").splitlines()
    assert lines[0].endswith("some differ.")
    assert lines[1:15] == [
        *(f"  problem {number}" for number in range(12)),
        "  and 3 further differences",
        "  other torch",
    ]
    assert not any("(1 - f)" in line for line in lines)


@pytest.mark.parametrize(
    ("options", "num_threads", "use_gpu", "num_cpus", "num_processes"),
    [
        ({"all": True}, 1, False, 6, 6),
        ({"sample": 3}, 2, False, 7, 3),
        ({"sample": 1}, 8, False, 6, 1),
        ({"all": True}, 1, True, 6, 1),
        ({"all": True, "jobs": 4, "hdf5_file": "a.hdf5"}, 1, True, 6, 4),
        ({"all": True}, 1, False, None, 1),
    ],
)
@pytest.mark.parametrize("of_members", [False, True])
def test_an_audit_has_as_many_processes_as_have_cpus(
    monkeypatch, options, num_threads, use_gpu, num_cpus, num_processes, of_members
) -> None:
    training = SimpleNamespace(use_gpu=use_gpu, num_threads=num_threads, max_epochs=9)
    audited: list[Any] = []
    kept: list[Path] = []
    found = SimpleNamespace(problems=(), replayed=(1,))
    name = "audit_ensemble" if of_members else "audit_experiment"
    monkeypatch.setattr("os.cpu_count", lambda: num_cpus)
    monkeypatch.setattr(verify, "is_ensemble", lambda _: of_members)
    monkeypatch.setattr(verify, "member_folders", lambda folder: [folder / "0", folder / "1"])
    monkeypatch.setattr(verify, "read_config", lambda _: SimpleNamespace(training=training))
    monkeypatch.setattr(verify, "kept_checkpoints", lambda folder: nullcontext(kept.append(folder)))
    monkeypatch.setattr(verify, "Progress", lambda max_epochs: SimpleNamespace(track=f"a bar of {max_epochs}"))
    monkeypatch.setattr(verify, "format_audit", lambda *_: "")
    monkeypatch.setattr(verify, name, lambda folder, **how: audited.append((folder, how)) or found)
    command, folder = verify.Options(experiment_dir="run", **options), Path("run")
    assert verify.run(command) == 0
    how = {"sample": options.get("sample"), "num_processes": num_processes, "hdf5_file": options.get("hdf5_file")}
    how |= {} if of_members else {"track": "a bar of 9"}
    assert audited == [(folder, how)]
    assert kept == ([folder / "0", folder / "1"] if of_members else [folder])
    found.problems = ("a metric",)
    assert verify.run(command) == 1
    found.problems, found.replayed = (), ()
    assert verify.run(command) == 1


@pytest.mark.parametrize("problems", [(), ("a metric",)])
def test_one_epoch_is_verified_with_a_bar(monkeypatch, capsys, problems) -> None:
    verified: list[Any] = []
    found, config = SimpleNamespace(problems=problems), SimpleNamespace(training=SimpleNamespace(max_epochs=9))
    monkeypatch.setattr(verify, "read_config", lambda _: config)
    monkeypatch.setattr(verify, "kept_checkpoints", nullcontext)
    monkeypatch.setattr(verify, "Progress", lambda max_epochs: SimpleNamespace(track=f"a bar of {max_epochs}"))
    monkeypatch.setattr(verify, "format_verification", lambda verification, name: f"{name}: {verification.problems}")
    monkeypatch.setattr(verify, "verify_epoch", lambda *given, **how: verified.append((given, how)) or found)
    assert verify.run(verify.Options(experiment_dir="run", epoch=4, hdf5_file="a.hdf5")) == len(problems)
    assert verified == [(("run",), {"epoch": 4, "hdf5_file": "a.hdf5", "track": "a bar of 9"})]
    assert capsys.readouterr().out == f"run: {problems}\n"


@pytest.mark.parametrize(
    ("ends", "recorded", "epochs", "expected"),
    [
        ({1, 2, 3}, {1, 2, 3}, {1, 2, 3}, ["epoch 1", "epoch 2", "epoch 3"]),
        ({3}, {1, 2, 3}, {1, 2, 3}, ["epochs 1 to 3"]),
        ({2, 4}, {1, 2, 3, 4, 5}, {1, 4}, ["epoch 1", "epochs 3 to 4"]),
        ({2, 4}, {1, 2, 3, 4, 5}, {3, 5}, ["epoch 3", "epoch 5"]),
        ({1, 2}, {4, 5}, {4, 5}, ["epochs 4 to 5"]),  # of a fork after epoch 3, whose checkpoint is another's
        ({3, 4}, {4, 5}, {5}, ["epoch 5"]),
        ({3}, {4, 5}, {5}, ["epochs 4 to 5"]),
        (set(), {1, 2}, {2}, ["epochs 1 to 2"]),
    ],
)
def test_a_span_begins_after_the_nearest_end_before_it(ends, recorded, epochs, expected) -> None:
    assert [str(span) for span in spans(ends, recorded, epochs)] == expected


def test_an_audit_sums_up_what_its_spans_found_once_each() -> None:
    found = [
        (Span(first=4, last=5), Replayed(True, ("b",), ("torch",))),
        (Span(first=1, last=1), Replayed(True, ("a", "b"), ("torch", "numpy"))),
        (Span(first=2, last=2), Replayed(False, left_out=("epoch 2: why",))),
    ]
    chosen = [span for span, _ in found]
    audit = summed_up(found, (1, 2, 4, 5), 3, chosen, ["a"], ["before the fork"], "ab")
    assert audit == Audit(
        recorded=(1, 2, 4, 5), replayed=(1, 4, 5), num_chosen=3, spans=tuple(chosen), problems=("a", "b"),
        context=("torch", "numpy"), left_out=("before the fork", "epoch 2: why"), record="ab",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (None, Replayed(True, ("a",), ("torch",))),
        (NothingLeft("no checkpoint"), Replayed(False, left_out=("epochs 2 to 3: no checkpoint",))),
        (ValueError("shapes"), Replayed(False, ("epochs 2 to 3: the replay failed: shapes",))),
        (NonFiniteError("nan"), Replayed(False, ("epochs 2 to 3: the replay failed: nan",))),
    ],
)
def test_a_replay_that_fails_is_a_problem_and_one_that_nothing_leads_to_is_left_out(error, expected) -> None:
    def replay() -> tuple[list[str], tuple[str, ...]]:
        if error is not None:
            raise error
        return ["a"], ("torch",)

    assert replayed(Span(first=2, last=3), replay) == expected


def test_options_that_do_not_fit_are_refused(cli, run):
    cli("verify", run, "--all", "--epoch", "2").check_refusal("one of --epoch, --all and --sample")
    cli("verify", run, "--jobs", "2").check_refusal("Give --all or --sample")
    cli("verify", run, "--sample", "0").check_refusal("sample: expected a finite number at least 1")


def test_a_process_that_fails_ends_the_audit_with_its_error(run, tmp_path):
    missing = str(tmp_path / "none.hdf5")
    with pytest.raises(FileNotFoundError, match=r"none\.hdf5"):
        audit_experiment(run, num_processes=2, hdf5_file=missing)
    with pytest.raises(RuntimeError, match=r"A process failed:\nTraceback"):
        list(in_processes(read_config, (), ["/no/such/run"] * 2, 2))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"^subject: expected one of sub_1, .* received 'sub_9'\.$"):  # the user's
        list(in_processes(_bundles, (), ["sub_9"] * 2, 2))


def _bundles(subjects: list[str]) -> Iterator[tuple[str, int]]:
    for subject in subjects:
        yield subject, len(load_bundles(subject))
