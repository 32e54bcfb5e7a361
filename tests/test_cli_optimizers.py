"""Claims about optimizers on the command line: the groups, averages and accumulation that a user asks for, exactly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from experiment_cases import CONFIG, PHANTOM, latest_digest, restored, trained
from optimizer_cases import SHAPES, run_torch, run_updates
from preloaded import run_ranks
from torch import Tensor

from dwiml_func import optim
from dwiml_func.checkpoint.digest import state_digest
from dwiml_func.checkpoint.index import list_checkpoints
from dwiml_func.core.metrics import read_means
from dwiml_func.core.non_finite import NonFiniteError
from dwiml_func.core.state import TrainState, init_state
from dwiml_func.data.config import BatchConfig
from dwiml_func.experiment.config import CheckpointConfig, config_from_json
from dwiml_func.experiment.ensemble_run import prepare_ensemble, run_ensemble
from dwiml_func.experiment.folder import create_ensemble, read_config
from dwiml_func.experiment.fork import create_fork, prepare_fork
from dwiml_func.experiment.model_store import load_model
from dwiml_func.experiment.optimizers import OPTIMIZERS, configured_optimizer
from dwiml_func.experiment.resume import resume_experiment
from dwiml_func.experiment.run import run_experiment
from dwiml_func.experiment.setup import RunParts, prepare
from dwiml_func.experiment.training_config import TrainingConfig
from dwiml_func.models.config import ModelConfig
from dwiml_func.models.learn2track import compute_batch_loss

OPTIONS = (
    *("--rnn-layer-sizes", "8", "--dropout", "0.25", "--nb-previous-dirs", "1", "--max-epochs", "2"),
    *("--batch-size-training", "20", "--batch-size-validation", "60", "--quiet", "--skip-figures"),
)
ALL_ON = (
    *("--rule", "*bias*: weight_decay=0, lr=0.5", "--rule", "rnn_model.rnn_0.weight_ih_l0: frozen"),
    *("--accumulate", "3", "--ema", "0.9", "--skip-not-finite", "2", "--clip-grad", "0.5", "--learning-rate", "0.01"),
)
SHORT = BatchConfig(
    batch_size_training=8,
    batch_size_validation=16,
    max_batches_per_epoch_training=4,
    max_batches_per_epoch_validation=1,
)
NEW_OPTIONS = ("momentum", "rule", "accumulate", "ema", "skip_not_finite")
RNN = "rnn_model.rnn_0.weight_ih_l0"
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def training(**options: Any) -> TrainingConfig:
    return replace(CONFIG.training, **options)


def parts_of(**options: Any) -> RunParts:
    return prepare(replace(CONFIG, model=ModelConfig(rnn_layer_sizes=(8,)), training=training(**options)))


def run_steps(parts: RunParts, num_steps: int, lr: float = 0.1) -> tuple[TrainState, list[dict[str, Any]]]:
    state, means = parts.first_state(), []
    for batch in islice(parts.train(state.key, 0, 0), num_steps):
        state, metrics = parts.step(state, batch, lr=lr)
        means.append(read_means(metrics))
    return state, means


def batch_loss(parts: RunParts, batch: Any) -> tuple[Tensor, int]:
    model: Any = parts.model
    loss, weight, *_ = compute_batch_loss(model, batch)
    return loss, int(weight)


# Names


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in ("Adam", "AdamW", "RAdam", "SGD", "RMSprop", "NAdam")),
        *((name, {"momentum": 0.8}) for name in ("SGD", "RMSprop")),
    ],
)
def test_a_name_is_that_of_torch_optim(name: str, options: dict[str, float]) -> None:
    further = {"foreach": False} if name == "RAdam" else {}
    params, _ = run_updates(configured_optimizer(training(optimizer=name, weight_decay=0.02, **options)), num_steps=8)
    expected = run_torch(
        lambda own: [getattr(torch.optim, name)(own.values(), weight_decay=0.02, **options, **further)], num_steps=8
    )
    for key, tensor in params.items():
        assert torch.equal(tensor, expected[key]), key


def test_muon_updates_matrices_and_adamw_the_rest_at_one_learning_rate() -> None:
    params, _ = run_updates(configured_optimizer(training(optimizer="Muon", weight_decay=0.02)), num_steps=8)

    def make(own: dict[str, torch.nn.Parameter]) -> list[torch.optim.Optimizer]:
        matrices = [param for param in own.values() if param.dim() == 2]
        rest = [param for param in own.values() if param.dim() != 2]
        muon = torch.optim.Muon(matrices, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
        return [muon, torch.optim.AdamW(rest, weight_decay=0.02)]

    expected = run_torch(make, num_steps=8)
    for key, tensor in params.items():
        assert torch.equal(tensor, expected[key]), key


@pytest.mark.parametrize("name", ["Lion", "ScheduleFreeAdamW", "ScheduleFreeSGD"])
def test_a_name_that_torch_lacks_is_that_of_the_library(name: str) -> None:
    library = {"Lion": optim.lion, "ScheduleFreeAdamW": optim.schedule_free_adamw}
    make = library.get(name, optim.schedule_free_sgd)
    actual, expected = run_updates(configured_optimizer(training(optimizer=name))), run_updates(make(weight_decay=0.01))
    assert all(torch.equal(actual[0][key], expected[0][key]) for key in SHAPES)


def test_the_default_is_plain_adam_and_an_older_config_means_it() -> None:
    parts = prepare(CONFIG)
    plain = init_state(parts.model, optim.adam(weight_decay=0.01), seed=CONFIG.training.rng)
    assert state_digest(parts.first_state()) == state_digest(plain)
    assert parts.optimizer.is_elementwise
    assert parts.optimizer.eval_params is None
    older = json.loads(CONFIG.to_json())
    for name in NEW_OPTIONS:
        del older["training"][name]
    assert config_from_json(json.dumps(older)) == CONFIG


# Groups


def test_rules_are_param_groups_of_torch_optim() -> None:
    rules = ("*bias: weight_decay=0, beta1=0.5", "b.*: lr=0.1")
    params, _ = run_updates(
        configured_optimizer(training(optimizer="AdamW", weight_decay=0.1, rule=rules)), num_steps=8
    )

    def make(own: dict[str, torch.nn.Parameter]) -> list[torch.optim.Optimizer]:
        groups = [
            {"params": [own["a.bias"]], "weight_decay": 0.0, "betas": (0.5, 0.999)},
            {"params": [own["b.weight"]], "lr_factor": 0.1},
            {"params": [own[name] for name in ("a.weight", "scale", "empty")]},
        ]
        return [torch.optim.AdamW(groups, weight_decay=0.1)]

    expected = run_torch(make, num_steps=8)
    for key, tensor in params.items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-6, atol=0)  # the rate's factor rounds once more


def test_frozen_parameters_stay_cost_nothing_and_count_in_no_norm() -> None:
    parts = parts_of(rule=("rnn_model.*: frozen",))
    start, (state, means) = parts.first_state(), run_steps(parts, 2)
    assert all(name.startswith("direction_getter.") for name in state.params)
    assert set(state.opt_state["exp_avg"]) == set(state.params)
    for name, tensor in start.buffers.items():
        assert torch.equal(state.buffers[name], tensor)
    batch = next(iter(parts.train(start.key, 0, 0)))
    batch_loss(parts, batch)[0].backward()
    grads = [param.grad for param in parts.model.parameters() if param.grad is not None]
    assert len(grads) == len(start.params)
    norm = torch.nn.utils.get_total_norm(grads)
    assert means[0]["unclipped_grad_norm"] == pytest.approx(norm.item(), rel=1e-5)


def test_the_first_rule_counts_also_where_a_later_one_freezes() -> None:
    parts = parts_of(rule=(f"{RNN}: lr=0.5", "rnn_model.*: frozen"))
    assert RNN in parts.first_state().params
    assert "rnn_model.rnn_0.weight_hh_l0" in parts.first_state().buffers


# Averages and accumulation


def test_the_average_is_validated_saved_and_evaluated(cli, tmp_path: Path) -> None:
    directory = trained(tmp_path, replace(CONFIG, training=training(ema=0.5, learning_rate=("0.01",))))
    state, history = restored(directory)
    best = load_model(directory / "best_model")
    assert history[-1].is_best
    average = state.opt_state["average"]
    for name, param in best.module.named_parameters():
        assert torch.equal(param, average[name])
        assert not torch.equal(param, state.params[name])
    assert best.facts["loss"] == history[-1].valid["loss"]
    outcome = cli("evaluate", directory, PHANTOM, "--subset", "validation", "--json")
    assert json.loads(outcome.out)["loss"] == pytest.approx(history[-1].valid["loss"], rel=1e-5)


def test_accumulated_batches_make_the_step_of_one_batch_with_all_their_points() -> None:
    """The gradients' mean, weighted by points, and then clipped."""
    options: dict[str, Any] = {"optimizer": "SGD", "weight_decay": 0.0}
    parts, batches, start = parts_of(**options), [], parts_of(**options).first_state()
    sums: dict[str, Tensor] = {name: torch.zeros_like(param) for name, param in start.params.items()}
    total = 0
    for batch in islice(parts.train(start.key, 0, 0), 2):
        batches.append(batch)
        parts.model.zero_grad()
        loss, weight = batch_loss(parts, batch)
        loss.backward()
        total += weight
        for name, param in parts.model.named_parameters():
            assert param.grad is not None
            sums[name] += weight * param.grad
    assert len({len(batch.points) for batch in batches}) == 2
    norm = torch.nn.utils.get_total_norm([tensor / total for tensor in sums.values()]).item()
    for clip_grad, factor in ((None, 1.0), (norm / 4, 0.25)):
        state, _ = run_steps(parts_of(accumulate=2, clip_grad=clip_grad, **options), 2)
        for name, param in state.params.items():
            expected = start.params[name] - 0.1 * factor * sums[name] / total
            torch.testing.assert_close(param, expected, rtol=1e-4, atol=1e-7)
    state, _ = run_steps(parts_of(accumulate=2, **options), 1)
    assert all(torch.equal(param, start.params[name]) for name, param in state.params.items())


def test_batches_that_are_not_finite_are_skipped_and_too_many_in_a_row_end_the_run() -> None:
    parts = parts_of(skip_not_finite=1, accumulate=2)
    first, second = islice(parts.train(parts.first_state().key, 0, 0), 2)
    bad = replace(first, inputs=first.inputs * torch.nan)
    states, metrics = [], {}
    for batches in ((first, second), (first, bad, second)):
        state = parts.first_state()
        for batch in batches:
            state, metrics = parts.step(state, batch, lr=0.1)
        states.append(state)
    assert metrics["skipped"] == (0.0, 1.0)
    assert all(torch.equal(states[0].params[name], param) for name, param in states[1].params.items())
    with pytest.raises(NonFiniteError, match="not finite in too many steps in a row"):
        list(_train_epoch(parts, [first, bad, bad, second]))


def _train_epoch(parts: RunParts, batches: Sequence[Any]) -> Any:
    from dwiml_func.core.loop import train_and_validate

    return train_and_validate(
        parts.first_state(), train=lambda *_: batches, step=parts.step, learning_rate=0.1, max_epochs=1
    )


# Runs


def all_on(name: str, **options: Any) -> Any:
    """Every option at once, in a run of one epoch that saves after each batch."""
    chosen = {"optimizer": name, "rule": (f"{RNN}: frozen", "*bias*: weight_decay=0, lr=0.5"), "accumulate": 2}
    chosen |= {"ema": 0.9, "skip_not_finite": 2, "clip_grad": 0.5, "learning_rate": ("0.01",), "max_epochs": 1}
    return replace(
        CONFIG,
        batches=SHORT,
        training=training(**chosen | options),
        checkpoints=CheckpointConfig(checkpoint_every="1batches", keep="all"),
    )


def resumed_from(directory: Path, name: str) -> str:
    """The digest at the end of a run that was killed after checkpoint `name`, and resumed."""
    killed = Path(shutil.copytree(directory, directory.parent / f"killed_{name}"))
    names = list_checkpoints(killed)
    for later in names[names.index(name) + 1 :]:
        shutil.rmtree(killed / "checkpoint" / later)
    parts, state, history = resume_experiment(killed)
    list(run_experiment(killed, parts, state=state, history=history))
    return latest_digest(killed)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in OPTIMIZERS),
        ("SGD", {"momentum": 0.9, "num_shards": 2}),
        ("RMSprop", {"precision": "bf16", "momentum": 0.5}),
    ],
)
def test_a_run_that_is_killed_within_an_epoch_ends_in_the_same_digest(tmp_path: Path, name: str, options: Any) -> None:
    directory = trained(tmp_path, all_on(name, **options))
    names = list_checkpoints(directory)
    assert names == ["0-1", "0-2", "0-3", "0-4", "1"]
    assert resumed_from(directory, "0-3") == latest_digest(directory)


def test_a_run_with_every_option_is_verified_listed_and_compared(cli, tmp_path: Path) -> None:
    trained(tmp_path, all_on("NAdam"), "one")
    trained(tmp_path, all_on("NAdam", ema=0.8, rule=("*bias*: lr=0.5",)), "other")
    assert cli("verify", tmp_path / "one").code == 0
    assert "finished" in cli("runs", tmp_path).out
    outcome = cli("diff", tmp_path / "one", tmp_path / "other")
    assert outcome.code == 1
    assert "training.ema: 0.9 in A, 0.8 in B" in outcome.out
    assert 'training.rule: ["rnn_model.rnn_0.weight_ih_l0: frozen", "*bias*: ' in outcome.out


@every_optimizer
def test_members_of_a_sweep_are_runs_of_their_own(tmp_path: Path, name: str) -> None:
    base = replace(all_on(name), model=ModelConfig(rnn_layer_sizes=(6,)), checkpoints=CheckpointConfig())
    decays = (0.0, 0.1)
    configs = [replace(base, training=replace(base.training, weight_decay=decay)) for decay in decays]
    directory = create_ensemble(tmp_path, "members", configs)
    list(run_ensemble(directory, prepare_ensemble(configs)))
    for number, config in list(enumerate(configs))[:: 1 if name == "AdamW" else -2]:  # of others, that with a decay
        alone = trained(tmp_path, config, f"alone_{number}")
        (state, history), (own, own_history) = restored(alone), restored(directory / str(number))
        tolerance = 3e-2 if name in ("Muon", "Lion") else 1e-4  # bfloat16; signs of gradients near zero
        for key, param in state.params.items():
            torch.testing.assert_close(own.params[key], param, rtol=tolerance, atol=tolerance)
        assert own_history[-1].valid["loss"] == pytest.approx(history[-1].valid["loss"], abs=tolerance)
        models = [load_model(path / "best_model").module for path in (alone, directory / str(number))]
        for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_nadam_takes_a_learning_rate_for_each_member(cli, tmp_path: Path) -> None:
    sweep = ("--optimizer", "NAdam", "--sweep", "learning-rate=0.1,0.01", "--max-epochs", "1")
    assert cli("train", tmp_path, "swept", PHANTOM, *OPTIONS, *sweep).code == 0


def test_an_older_config_resumes(tmp_path: Path) -> None:
    directory = trained(tmp_path, CONFIG)
    config = json.loads((directory / "config.json").read_text())
    for name in NEW_OPTIONS:
        del config["training"][name]
    (directory / "config.json").write_text(json.dumps(config))
    parts, state, history = resume_experiment(directory, new_max_epochs=3)
    assert [report.epoch for report in run_experiment(directory, parts, state=state, history=history)] == [3]


# Forks


def test_a_fork_unfreezes_and_says_that_the_optimizer_state_is_reset(cli, tmp_path: Path) -> None:
    trained(tmp_path, all_on("Adam", rule=("rnn_model.*: frozen",)), "frozen")
    source, _ = restored(tmp_path / "frozen")
    outcome = cli("fork", tmp_path / "frozen", "free", "--rule", "none", "--max-epochs", "2", "--quiet")
    assert outcome.code == 0, outcome.err
    config = read_config(tmp_path / "free")
    assert config.training.rule == ()
    assert config.training.ema == 0.9
    first, _ = restored(tmp_path / "free", name="1")
    for name, tensor in {**source.params, **source.buffers}.items():
        assert torch.equal(first.params[name], tensor)
    assert first.step == 0
    assert int(first.opt_state["0"]["skipped"]) == 0
    assert not restored(tmp_path / "free")[0].params[RNN].equal(source.buffers[RNN])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("source"), all_on("Adam"))


@pytest.mark.parametrize(
    "changes",
    [
        *({"ema": 0.5}, {"ema": None}, {"accumulate": 3}, {"rule": ("*: lr=0.5",)}, {"skip_not_finite": 5}),
        *({"optimizer": "SGD", "momentum": 0.5}, {"optimizer": "Muon"}),
    ],
    ids=lambda changes: "_".join(changes),
)
def test_a_fork_resets_the_optimizer_state_and_keeps_the_best_model(
    tmp_path: Path, source: Path, changes: dict[str, Any]
) -> None:
    config = all_on("Adam", **{"max_epochs": 2} | changes)
    fork = prepare_fork(source, config)
    assert fork.notes == (f"Another {', '.join(changes)}: the optimizer state is reset.",)
    expected = fork.parts.optimizer.init(fork.state.params)
    assert state_digest(fork.state) == state_digest(fork.state.replace(opt_state=expected, step=0))
    best = load_model(source / "best_model").module.state_dict()
    for name, tensor in load_model(create_fork(tmp_path, "new", fork) / "best_model").module.state_dict().items():
        assert torch.equal(tensor, best[name]), name


# Refusals


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--rule", "enc*: frozen"], ["'enc*'", "rnn_model.rnn_0.weight_ih_l0"]),
        (["--rule", "direction_geter.layers.0.bias: lr=0.1"], ["The parameters are direction_getter.layers.0.bias"]),
        (["--rule", "*bias*: lr=0.1", "--rule", "*.bias: lr=1"], ["'*.bias'", "earlier rules"]),
        (["--rule", "*: frozen"], ["expected a parameter to train"]),
        (["--optimizer", "Muon", "--rule", "*: exclude=enc*"], ["'enc*'"]),
        (["--rule", "*bias*: lr=0.1", "--rule", "*bias*: frozen"], ["one rule for '*bias*'"]),
        (["--rule", "*bias*"], ["expected 'PATTERN: NAME=VALUE, ...'"]),
        (["--rule", "*bias*: lr=1, lr=2"], ["rule '*bias*': expected lr once, received it twice"]),
        (["--rule", "*bias*: lr"], ["expected NAME=VALUE with one of ", " lr, ", "received 'lr' for Adam"]),
        (["--rule", "*bias*: frozen, lr=1"], ["frozen alone", "'frozen'"]),
        (["--rule", "*bias*: momentum=0.9"], ["beta1, beta2, eps, lr, weight_decay", "'momentum=0.9' for Adam"]),
        (["--rule", "*bias*: lr=fast"], ["expected a number for lr", "'fast'"]),
        (["--rule", "*bias*: lr=1, lr=2"], ["expected lr once"]),
        (["--rule", "*bias*: beta1=1"], ["Expected beta1", "beta1=1"]),
        (["--rule", "*bias*: lr=-1"], ["lr=-1"]),
        (["--momentum", "0.9"], ["SGD, RMSprop, Muon, ScheduleFreeSGD", "Adam"]),
        (["--optimizer", "SGD", "--rule", "*bias*: nesterov=true"], ["momentum above 0"]),
        (["--ema", "1"], ["decay=1"]),
        (["--accumulate", "0"], ["accumulate", "at least 1"]),
        (["--skip-not-finite", "0"], ["skip_not_finite", "at least 1"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    cli: Callable[..., Any], tmp_path: Path, arguments: list[str], named: list[str]
) -> None:
    cli("train", tmp_path, "new", PHANTOM, *OPTIONS, *arguments).check_refusal(*named)
    assert list(tmp_path.iterdir()) == []


def test_an_ensemble_and_a_dry_run_are_refused_too(cli, tmp_path: Path) -> None:
    for further in (("--num-models", "2"), ("--dry-run",)):
        cli("train", tmp_path, "new", PHANTOM, *OPTIONS, "--rule", "enc*: frozen", *further).check_refusal("'enc*'")
    assert list(tmp_path.iterdir()) == []


def test_rules_of_the_command_line_replace_those_of_a_config(cli, tmp_path: Path) -> None:
    part = tmp_path / "part.json"
    part.write_text(json.dumps({"training": {"rule": ["*bias*: lr=0.5"], "accumulate": 2}}))
    arguments = ("train", tmp_path, "new", PHANTOM, "--config", part, "--dry-run")
    for given, expected in (
        ((), ("*bias*: lr=0.5",)),
        (("--rule", "*.bias: frozen", "--rule=*: lr=2"), ("*.bias: frozen", "*: lr=2")),
        (("--rule", "none"), ()),
    ):
        config = config_from_json(cli(*arguments, *given).out)
        assert config.training.rule == expected
        assert config.training.accumulate == 2


# Several processes


@pytest.mark.soak
def test_two_processes_end_with_the_digest_of_one(tmp_path: Path) -> None:
    for num_processes, name in ((1, "one"), (2, "two")):
        run_ranks(num_processes, "train", tmp_path, name, PHANTOM, *OPTIONS, *ALL_ON, "--num-shards", "2")
    assert latest_digest(tmp_path / "one") == latest_digest(tmp_path / "two")
