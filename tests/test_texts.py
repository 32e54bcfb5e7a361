"""What commands print about results, word for word: numbers, signs, units, order and plurals (`data/texts.txt`)."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable
from dataclasses import fields, replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_summary import evaluation, report

from dwiml_func.checkpoint.checkpoint import Checkpoint
from dwiml_func.cli import _several, _summary, _training, bisect, diff, evaluate, runs, score, verify
from dwiml_func.compiled.step import JitStep
from dwiml_func.compiled.warmup import WarmUpStep
from dwiml_func.core.early_stopping import Best
from dwiml_func.core.non_finite import NonFiniteError
from dwiml_func.data.grid import Grid
from dwiml_func.data.hdf5.problems import Problem
from dwiml_func.data.inspection.groups import Steps, StreamlineSummary, VolumeSummary
from dwiml_func.data.inspection.inspect import Inspection
from dwiml_func.data.inspection.report import format_inspection
from dwiml_func.ensemble.loop import EnsembleReport
from dwiml_func.experiment.audit.bisect import Bisection
from dwiml_func.experiment.audit.lockstep import Difference
from dwiml_func.experiment.audit.replay import Verification
from dwiml_func.experiment.comparison.compare import Comparison, compare_experiments
from dwiml_func.experiment.comparison.runs import RunOverview
from dwiml_func.experiment.config import RunConfig
from dwiml_func.experiment.evaluation import ModelEvaluation
from dwiml_func.experiment.reconstruction import Reconstruction
from dwiml_func.experiment.signals import StopRequest
from dwiml_func.experiment.tracking.evaluation import ORACLE, TrackingEvaluation
from dwiml_func.experiment.training_config import TrainingConfig
from dwiml_func.tracking.protocols import ProtocolScores
from dwiml_func.tracking.scores import BundleScores, TractogramScores

TEXT_FILE = Path(__file__).parent / "data" / "texts.txt"
EXPECTED = dict(re.findall(r"^== (.+)\n((?:(?!== ).*\n)*)", TEXT_FILE.read_text(), re.MULTILINE))


def lags(loss: float, angle: float, lag: float) -> dict[str, float]:
    return {"loss": loss, "angular_error": angle, "tracking_window_lag": lag}


BY_ANGLE: dict[str, Any] = {"monitor": "angular_error", "stop": None}
HISTORY = [
    report(epoch=1, best=Best(0.5, 1), train={"loss": 0.75}, valid=lags(0.5, 30, 4), stop=None),
    report(epoch=2, best=Best(20, 2, 0, 5), valid=lags(0.625, 20, 3.5), train_minutes=0.2, **BY_ANGLE),
    report(epoch=3, best=Best(20, 2, 1, 5), train={"loss": 0.125}, valid=lags(0.75, 25, 3), batch=7, **BY_ANGLE),
]
POINTS = Reconstruction(model=1.5, median=1.25, percentile_95=3.0, num_points=80, num_streamlines=2)
BASELINES: dict[str, Any] = {"mean_streamline": 9.0, "principal_components": 2.5, "num_components": 4}


def scores(valid: float, both_ends: float, lag: tuple[float, ...] | None = None) -> ProtocolScores:
    return ProtocolScores(9, 8, valid, both_ends, lag)


def by_protocol(*shares: tuple[float, float]) -> Any:
    return {name: scores(*share) for name, share in zip(("continue", "free", "core"), shares, strict=True)}


TRACKING = TrackingEvaluation(
    subject="anna",
    subset="validation",
    step_size=0.5,
    has_mask=True,
    scores={
        "model": by_protocol((0.5, 0.75), (0, 0.1), (0.25, 1))
        | {"continue": scores(0.5, 0.75, (1.0, 2.04, float("nan"), float("nan")))},
        "keep going straight": by_protocol((0.12, 0.25), (0, 0.2), (0.3, 0.4)),
        "principal direction": by_protocol((0.01, 0.02), (0.03, 0.04), (0.05, 0.06)),
        ORACLE: by_protocol((1, 1), (0.9, 0.95), (0.8, 0.85)),
    },
    ceiling_valid=0.84,
    ceiling_both_ends=0.88,
)
VERIFIED = Verification(epoch=3, is_replayed=True, start="2", digest="ab", num_values=9, problems=(), context=())
EQUAL = Comparison(
    config=(),
    environment=(),
    data=(),
    num_epochs=(3, 3),
    num_digests=2,
    first_state=None,
    first_metrics=None,
    metrics=(),
    notes=(),
)
OTHER: dict[str, Any] = {"config": ("lr: 1 in A, 2 in B",), "environment": None, "data": ("d",), "notes": ("n", "m")}
NOWHERE = Bisection(equal=None, different=None)
WITHIN = replace(NOWHERE, equal=(1, 3), different=(2, 0), start="1-3", lines=("config: x",))
TENSORS = Difference(2, 5, ("a", "b", "c", "d"), ("one", "two"))
MODEL = ModelEvaluation(
    loss=0.12345678,
    num_points=80,
    num_streamlines=5,
    angular_error=12.344,
    compared=evaluation(principal_direction=None, num_points=70),
    window_lag=3.456,
)
CONFIG = RunConfig(hdf5_file="", training=TrainingConfig(learning_rate=("0.1*2", "0.01"), rng=7))
OTHER_TRAINING = replace(CONFIG.training, learning_rate=("0.5",), weight_decay=1e-5, rng=8)
TIME = datetime(2026, 1, 31, 14, 5)
RUNS = [
    RunOverview(
        name="a",
        state="finished",
        epochs=3,
        max_epochs=4,
        best_epoch=2,
        best_loss=0.25,
        angular_error_deg=21.5,
        window_lag_mm=3.25,
        valid_share={"continue": 0.5, "free": 0.12},
        minutes=0.5,
        last_change=TIME,
    ),
    RunOverview(
        name="b",
        state="interrupted",
        epochs=1,
        best_epoch=1,
        monitor="grad_norm",
        best_value=0.5,
        minutes=59.94,
        last_change=TIME,
        problems=("p q",),
    ),
    RunOverview(
        name="c", state="corrupt", minutes=60, last_change=TIME, monitor="angular_error", best_value=3, problems=("r",)
    ),
]


def of_members() -> str:
    own = report(stop=None, valid={"loss": 0.5, "overlap": 0.75}, monitor="overlap")
    ended = report(stop="patience", is_best=False, valid={"loss": 0.625})
    members = {0: own, 2: ended, 3: report(stop="max_epochs", is_best=False)}
    members[4] = report(train={"loss": 0.5, "overlap": 0.25}, valid={}, monitor="overlap", stop=None)
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        _several._print_epoch(EnsembleReport(epoch=2, members=members, failed={1: "The loss is nan."}), 9)
        _several._print_epoch(EnsembleReport(epoch=3, members={0: own}, failed={}, batch=5), 9)
    return shown.getvalue().strip()


def of_graphs() -> str:
    played: Any = type("Played", (JitStep,), {"num_cuda_graphs": 0, "cuda_graphs_reason": None})
    warm: Any = WarmUpStep.__new__(WarmUpStep)
    warm.graph = SimpleNamespace(num_compilations=1)
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        for num, reason in ((2, None), (1, "too large"), (0, None)):
            step = played.__new__(played)
            step.num_cuda_graphs, step.cuda_graphs_reason = num, reason
            _training.print_graphs(step)
        _training.print_graphs(warm)
        warm.graph.num_compilations = 0
        _training.print_graphs(warm)
    return shown.getvalue().strip()


@pytest.mark.parametrize("is_equal", [True, False])
def test_runs_are_compared_in_the_order_that_was_given(monkeypatch, capsys, is_equal: bool) -> None:
    monkeypatch.setattr(diff, "compare_experiments", lambda *given: SimpleNamespace(text=given, is_equal=is_equal))
    monkeypatch.setattr(diff, "format_comparison", lambda comparison: " and ".join(comparison.text))
    assert diff.run(diff.Options(dir_a="one", dir_b="two")) == (not is_equal)
    assert capsys.readouterr().out == "A: one\nB: two\none and two\n"


def test_what_compilation_took_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    warm: Any = WarmUpStep.__new__(WarmUpStep)
    warm.report = "Compiled in 3 s"
    parts: Any = SimpleNamespace(step=warm)
    for _ in range(2):
        _training._print_compilation(parts)
    parts.step = SimpleNamespace(report="of another step")
    _training._print_compilation(parts)
    assert capsys.readouterr().out == "Compiled in 3 s\n"


@pytest.mark.parametrize(
    ("epoch", "batch", "told"),
    [
        (0, 0, ""),
        (0, 3, "Resuming from checkpoint 0-3: next is epoch 1, batch 4.\n"),
        (2, 0, "Resuming from checkpoint 2: next is epoch 3.\n"),
    ],
)
def test_an_ensemble_says_where_it_resumes_and_who_failed(monkeypatch, capsys, epoch, batch, told) -> None:
    given: list[Any] = []

    def run(directory: Path, members: Any, arguments: Any, **options: Any):
        given.append(options | {"members": members, "arguments": arguments})
        yield EnsembleReport(epoch=1, members={0: report(epoch=1)}, failed={1: "The loss is nan."})

    arguments = {"step": max}
    monkeypatch.setattr(_several, "run_ensemble", run)
    monkeypatch.setattr(_several, "loop_arguments", lambda members, device: arguments)
    ensemble: Any = SimpleNamespace(epoch=epoch, batch=batch, active=torch.ones(2))
    members: Any = [SimpleNamespace(config=CONFIG)] * 2
    assert _several._train_at_once(Path("e"), members, ensemble, [(), ()], None) == {"1": "The loss is nan."}
    described = _several.describe_members(Path("e"), [CONFIG] * 2)
    assert capsys.readouterr().out.startswith(f"{described}\n{told}Epoch 1/")
    [options] = given
    assert isinstance(options.pop("stop"), StopRequest)
    assert options == {"members": members, "arguments": arguments, "ensemble": ensemble, "histories": [(), ()]}

    failed = EnsembleReport(epoch=1, members={}, failed={0: "The loss is inf."})
    for reports, histories, error in (([failed], [(), ()], "The loss is inf"), ([], [(), ()], "No member was trained")):
        monkeypatch.setattr(_several, "run_ensemble", lambda *_, reports=reports, **__: iter(reports))
        with pytest.raises(NonFiniteError, match=error):
            _several._train_at_once(Path("e"), members, ensemble, histories, None)
    monkeypatch.setattr(_several, "run_ensemble", lambda *_, **__: iter([failed]))
    assert _several._train_at_once(Path("e"), members, ensemble, [(), (report(epoch=1),)], None) == {
        "0": "The loss is inf."
    }


@pytest.mark.parametrize("is_sweep", [True, False])
def test_the_table_of_an_ensemble_shows_what_its_members_may_differ_in(monkeypatch, capsys, is_sweep: bool) -> None:
    run = SimpleNamespace(record=SimpleNamespace(config=CONFIG))
    options = dict.fromkeys(("training.learning_rate", "model.dropout", "training.weight_decay", "training.rng"))
    monkeypatch.setattr(_several, "is_sweep", lambda _: is_sweep)
    monkeypatch.setattr(_several, "list_runs", lambda _: [run])
    monkeypatch.setattr(_several, "best_first", lambda runs: (runs, "loss"))
    monkeypatch.setattr(_several, "distinguishing", lambda configs: (options, None))
    monkeypatch.setattr(_several, "format_runs", lambda runs, shown: f"{len(runs)}: {' '.join(shown)}")
    _several.print_table(Path("e"), {"ab": "The loss is nan."})
    columns = "" if is_sweep else "learning_rate weight_decay rng"
    title = "\ne, the best by loss first:\n"
    assert capsys.readouterr().out == f"{title}1: {columns}\nab ended with an error: The loss is nan.\n"
    monkeypatch.setattr(_several, "list_runs", lambda _: [])
    _several.print_table(Path("e"))
    assert capsys.readouterr().out == f"{title}0: \n"


def bundle(num: float, valid: float, mdf: float) -> BundleScores:
    values = (num, valid, 0.25, 0.125, 0.0625, 0.03, 12.34, mdf, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
    return BundleScores(**dict(zip((each.name for each in fields(BundleScores)), values, strict=True)))


def of_scores(*, num_seeds: int | None = None, has_bundles: bool = True) -> str:
    found = TractogramScores(
        {"CST": bundle(12, 0.5, 1.5), "a longer name": bundle(1234, 1.0, float("nan"))},
        bundle(623, 0.75, 2.25),
        bundle(1246, 0.8, 2.5),
    )
    of: Any = [SimpleNamespace(name=name, ends_mm=4.0, mdf_mm=10.375) for name in ("CST", "a longer name")]
    ceiling = found._replace(mean=bundle(9, 0.95, 1.0), all=bundle(10, 0.85, 1.25))
    return "\n".join(score._text(found, ceiling, tuple(of) if has_bundles else (), num_seeds))


AFFINE = np.array([[0, -2.0, 0, 1], [1.25, 0, 0, 2], [0, 0, 3, 3], [0, 0, 0, 1]])
GRID = Grid(AFFINE, (9, 8, 7))
HARMONICS: dict[str, Any] = {"sh_order": 2, "sh_legacy": True, "sh_of": "fodf"}
LINES = StreamlineSummary(
    num_streamlines=3,
    num_points=1200,
    lengths=np.array([10.0, 20, 60]),
    steps=Steps(4, 2.0, 0.4, 0.25, 0.75),
    grid=GRID,
    extras=("data per streamline 'w'",),
    bundles=tuple("abcde"),
)
OTHER_LINES = LINES._replace(num_points=34, lengths=np.array([40.0]), bundles=tuple("edfghi"), extras=("a matrix",))
UNKNOWN_LINES = StreamlineSummary(2, 5, None, None, None, ())
INSPECTED = Inspection(
    path=Path("a.hdf5"),
    num_bytes=1_250_000,
    attributes={"data_and_time": "01 May 2026", "step_size": "0.5", "nb_points": "Not defined by user"},
    subsets={"training": ("anna", "bo"), "validation": ("c",), "testing": ()},
    subjects={
        "anna": {"input": VolumeSummary((9, 8, 7, 6), GRID, HARMONICS), "lines": LINES},
        "bo": {
            "input": VolumeSummary((9, 8, 7, 28), None, {"sh_order": 6, "sh_basis": "tournier07"}),
            "lines": OTHER_LINES._replace(steps=Steps(12, 9.0, 0.7, 0.5, 1.5)),
        },
        "c": {"input": VolumeSummary((9, 8, 7, 6), GRID, HARMONICS), "mask": VolumeSummary(None, None)},
        "d": {"lines": UNKNOWN_LINES, "mask": VolumeSummary((9, 8, 7, 1), GRID), "input": UNKNOWN_LINES},
    },
    problems=(Problem("", "wrong"),) * 52,
    warnings=(Problem("subject 'bo'", "a copy"),),
)
ALONE = replace(INSPECTED, subjects={"d": {"lines": UNKNOWN_LINES}}, warnings=(), num_bytes=49_999)


def inspected(inspection: Inspection, **changes: Any) -> str:
    text = format_inspection(replace(inspection, **changes)) + "\n"
    return text.replace("  wrong\n" * 50, "  wrong, 50 times\n").rstrip("\n")


def compared(monkeypatch: pytest.MonkeyPatch, **of_b: Any) -> Comparison:
    """A run of three epochs, whose second has no digest, beside one that differs from it in what is given."""
    history = (report(epoch=1, digest="a"), report(epoch=2, digest=None), report(epoch=3, digest="c"))
    known: dict[str, Any] = {"history": history, "environment": {"torch": "2"}, "data": {"sha256": "d", "size": 3}}
    a = Checkpoint(name="3", digest="c", config={}, read_state=lambda: pytest.fail("not read"), **known)
    both = {Path("a"): a, Path("b"): replace(a, **of_b) if of_b.get("name") != "" else None}
    monkeypatch.setattr("dwiml_func.experiment.comparison.compare.newest", both.get)
    monkeypatch.setattr("dwiml_func.experiment.folder.recorded_config", lambda directory, _: {"name": str(directory)})
    return compare_experiments(Path("a"), Path("b"))


def test_a_comparison_says_what_differs_from_when_and_what_could_not_be_compared(monkeypatch) -> None:
    same = compared(monkeypatch)
    undigested = "1 of the common epochs have no digest: no checkpoint was due there"
    assert same == replace(
        EQUAL, config=('name: "a" in A, "b" in B',), num_epochs=(3, 3), num_digests=2, notes=(undigested,)
    )
    train = {"loss": 0.5}
    others = (report(epoch=1, digest="a"), report(epoch=2, train=train, train_minutes=9), report(epoch=3, digest="x"))
    data = {"sha256": "e", "size": 3, "modified": 1}
    found = compared(monkeypatch, history=(*others, report(epoch=4)), environment={"torch": "3"}, data=data)
    assert (found.num_epochs, found.num_digests, found.first_state, found.first_metrics) == ((3, 4), 2, 3, 2)
    assert found.metrics == ("train.loss: 0.25 in A, 0.5 in B",)
    assert (found.environment, found.data) == (('torch: "2" in A, "3" in B',), ('sha256: "d" in A, "e" in B',))
    assert not found.is_equal
    partly = compared(monkeypatch, history=others[:1], data={}, corrupt={"2": "2 is corrupt"})
    assert (partly.num_epochs, partly.num_digests, partly.first_state, partly.first_metrics) == ((3, 1), 1, None, None)
    assert (partly.data, partly.environment) == (None, ())
    assert partly.notes == ("B has no recorded fingerprint of its data", "B: 2 is corrupt")
    alone = compared(monkeypatch, name="")
    assert (alone.num_epochs, alone.num_digests, alone.environment, alone.data) == ((3, 0), 0, None, None)
    assert alone.notes == ("B has no checkpoint yet",)


TEXTS: dict[str, Callable[[], str]] = {
    "summary": lambda: _summary.format_summary(
        HISTORY, evaluation(first_points=33.0), subset="validation", tracking="how it tracks"
    ),
    "summary of seconds": lambda: _summary.format_summary(
        [report(train_minutes=0.25, valid_minutes=0.125)], evaluation(keep_straight=11.0), subset="training"
    ),
    "reconstruction": lambda: _summary.format_reconstruction(POINTS, subset="testing"),
    "summary of an autoencoder": lambda: _summary.format_summary(
        [report()], replace(POINTS, **BASELINES), subset="validation"
    ),
    "tracking": lambda: _summary.format_tracking(TRACKING),
    "verified": lambda: verify.format_verification(VERIFIED, "run"),
    "verified from the start": lambda: verify.format_verification(
        replace(VERIFIED, digest=None, start=None, context=("torch", "numpy")), "run"
    ),
    "verified and different": lambda: verify.format_verification(
        replace(VERIFIED, problems=("p", "q"), context=("c",)), "run"
    ),
    "not replayed": lambda: verify.format_verification(replace(VERIFIED, is_replayed=False, problems=("p",)), "run"),
    "equal": lambda: diff.format_comparison(EQUAL),
    "different": lambda: diff.format_comparison(replace(EQUAL, num_epochs=(3, 1), num_digests=1, **OTHER)),
    "nothing in common": lambda: diff.format_comparison(replace(EQUAL, num_digests=0, num_epochs=(2, 0))),
    "different results": lambda: diff.format_comparison(
        replace(EQUAL, first_state=2, first_metrics=3, metrics=("x", "y"))
    ),
    "bisected: equal": lambda: bisect.format_bisection(replace(NOWHERE, equal=(2, 0))),
    "bisected: no state": lambda: bisect.format_bisection(NOWHERE),
    "bisected: tensors": lambda: bisect.format_bisection(replace(WITHIN, found=TENSORS)),
    "bisected: other machines": lambda: bisect.format_bisection(
        replace(NOWHERE, equal=(2, 0), different=(2, 4), start="2", unlike=("B",))
    ),
    "bisected: first states": lambda: bisect.format_bisection(
        replace(NOWHERE, different=(1, 0), found=Difference(0, None, (), ("seed",)))
    ),
    "bisected: after the batches": lambda: bisect.format_bisection(
        replace(NOWHERE, equal=(0, 0), different=(1, 0), found=Difference(1, None, (), ("z",)))
    ),
    "evaluated": lambda: evaluate._text(MODEL, "testing", 2),
    "evaluated without windows": lambda: evaluate._text(
        replace(MODEL, window_lag=None, compared=evaluation(principal_direction=7.126)), "validation", 1
    ),
    "runs": lambda: runs.format_runs(RUNS),
    "runs by name": lambda: runs.format_runs(RUNS[:1], shown=["best_loss"]),
    "members": of_members,
    "not finite": lambda: "\n".join(
        str(_training._with_command(NonFiniteError("The loss is nan.", at=at), Path("a b", "run")))
        for at in ((2, 5), None)
    ),
    "graphs": of_graphs,
    "ensemble": lambda: _several.describe_members(Path("e"), [CONFIG, replace(CONFIG, training=OTHER_TRAINING)]),
    "scores": of_scores,
    "scores of seeds": lambda: of_scores(num_seeds=2492),
    "scores without bundles": lambda: of_scores(num_seeds=2492, has_bundles=False),
    "inspected": lambda: inspected(INSPECTED),
    "inspected and nothing found": lambda: inspected(
        ALONE, problems=(), attributes={}, subsets={"training": tuple("abcdefghi")}
    ),
    "inspected and one problem": lambda: inspected(
        ALONE, problems=INSPECTED.problems[:1], attributes={"nb_points": "9"}, subsets={}
    ),
    "inspected and fifty problems": lambda: inspected(
        ALONE, problems=INSPECTED.problems[:50], attributes={"compress": "0.1"}, subjects={}
    ),
    "start": lambda: f"{_training.describe_start(3, 0)}\n{_training.describe_start(3, 4)}",
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_result_is_printed_word_for_word(name: str) -> None:
    assert TEXTS[name]() + "\n" == EXPECTED[name]


@pytest.mark.parametrize(
    ("changes", "is_equal"),
    [
        ({}, True),
        ({"notes": ("n",)}, True),
        ({"environment": None, "data": None}, True),
        *(({name: ("x",)}, False) for name in ("config", "environment", "data")),
        ({"num_epochs": (3, 2)}, False),
        ({"first_state": 1}, False),
        ({"first_metrics": 1}, False),
    ],
)
def test_runs_are_equal_where_nothing_differs(changes: dict[str, Any], is_equal: bool) -> None:
    assert replace(EQUAL, **changes).is_equal == is_equal
