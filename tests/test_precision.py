"""Claims about mixed precision: the model's products in bfloat16, the rest in float32, bitwise reproducible."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from experiment_cases import CONFIG, PHANTOM, latest_digest
from reproduction_cases import STOCHASTIC
from test_compiled_learn2track import NUM_FEATURES, some_batch
from torch import Tensor
from torch.func import grad, vmap

from dwiml_func import Key, adam, init_state, module_loss, read_means, sgd, train_step, value_and_grad
from dwiml_func.compiled.step import jit_step
from dwiml_func.core.metrics import add_metrics
from dwiml_func.core.precision import autocast_forward, check_bf16
from dwiml_func.core.rng import torch_rng
from dwiml_func.data.hdf5.read import open_dataset
from dwiml_func.distributed.sharding import sharded_value_and_grad
from dwiml_func.ensemble.state import member, stack_states
from dwiml_func.ensemble.step import ensemble_step
from dwiml_func.experiment.config import config_from_json
from dwiml_func.experiment.evaluation import evaluate_model
from dwiml_func.experiment.folder import read_config
from dwiml_func.experiment.model_store import load_model
from dwiml_func.experiment.setup import prepare
from dwiml_func.experiment.training_config import TrainingConfig
from dwiml_func.models.direction_getters import DIRECTION_GETTERS
from dwiml_func.models.learn2track import Learn2Track, compute_batch_loss
from dwiml_func.models.rnn.scan import plain_scan
from dwiml_func.models.rnn.stacked import RecurrentLayer

U = 2.0**-8  # the largest relative error of rounding to bfloat16's 8 bits, and a half of it
LOW = torch.bfloat16


class Observed(torch.nn.Module):
    """A linear layer used twice, with batch normalization between, which notes the dtypes that went through it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 3)
        self.norm = torch.nn.BatchNorm1d(3)
        self.seen: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Tensor:
        first = self.linear(x)
        second = self.linear(self.norm(first))
        self.seen = [first.dtype, second.dtype]
        return second


def made(factory: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    with torch_rng(Key(1)):
        return factory(*arguments, **options)


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors.values()])


def difference(actual: Any, expected: Any) -> float:
    actual, expected = flat(actual), flat(expected)
    return float((actual - expected).norm() / expected.norm())


def test_the_layers_run_in_bfloat16_and_all_that_a_step_leaves_is_in_float32():
    seen = []

    def loss(model: Observed, x: Tensor) -> tuple[Tensor, int, dict[str, Tensor]]:
        outputs = model(x)
        seen.extend([*model.seen, outputs.dtype])
        return outputs.square().mean(), len(x), {"size": outputs.abs().mean()}

    model = made(Observed)
    state = init_state(model, adam(), seed=0)
    loss_fn = module_loss(model, loss, autocast=LOW)
    out = loss_fn(state.params, state.buffers, rows(8, 3), key=Key(0), train=True)
    assert {mean.dtype for mean in (out.loss, *out.aux.values()) if isinstance(mean, Tensor)} == {torch.float32}
    after, _ = train_step(state, rows(8, 3), loss_fn=loss_fn, optimizer=adam(), lr=0.01)
    assert seen[:3] == [LOW, LOW, torch.float32]
    tensors = [*after.params.values(), *after.opt_state["exp_avg"].values(), after.buffers["norm.running_mean"]]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    assert model.forward.__func__ is Observed.forward  # the caller's module is as it was
    assert model.seen == []


def test_results_come_back_in_float32_wherever_they_are():
    class Pair(NamedTuple):
        one: Any
        other: Any

    @dataclass
    class Some:
        value: Any

    class Nested(torch.nn.Linear):
        def forward(self, input: Tensor) -> Any:
            y = super().forward(input)
            return Pair({"a": [y, (y, None)]}, Some(y)), torch.arange(2), y.double(), "text"

    pair, numbers, double, text = autocast_forward(Nested(2, 2), LOW)(torch.ones(1, 2))
    assert isinstance(pair, Pair)
    assert isinstance(pair.other, Some)
    first, (second, nothing) = pair.one["a"]
    assert {first.dtype, second.dtype, pair.other.value.dtype} == {torch.float32}
    assert (nothing, numbers.dtype, double.dtype, text) == (None, torch.int64, torch.float64, "text")


def test_another_dtype_is_refused_by_name():
    with pytest.raises(ValueError, match=r"Expected torch.bfloat16 for autocast. Received: torch.float16"):
        module_loss(torch.nn.Linear(1, 1), lambda model, x: (model(x).sum(), 1), autocast=torch.float16)


def test_a_device_without_bfloat16_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)
    check_bf16(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    check_bf16(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old Card")
    with pytest.raises(ValueError, match=r"precision bf16: Old Card has no .*Use precision float32"):
        check_bf16(torch.device("cuda"))
    check_bf16(torch.device("cpu"))


def test_the_gradient_of_a_linear_layer_is_within_the_rounding_of_its_closed_form():
    """The loss is linear in the weights: mean of c . (W x), with c and the number of rows powers of two, which are not
    rounded. So only x and the gradient itself are: |error| <= (U/2 + U/2) sum |x c|, and a little for float32."""
    model, x = torch.nn.Linear(5, 3, bias=False), rows(64, 5)
    c = torch.tensor([1.0, -2.0, 4.0])
    loss_fn = module_loss(model, lambda model, x: ((model(x) * c).sum(1).mean(), len(x)), autocast=LOW)
    _, grads = value_and_grad(loss_fn, dict(model.named_parameters()), {}, x, key=Key(0))
    exact = torch.outer(c.double(), x.double().mean(0))
    bound = 1.01 * U * torch.outer(c.double().abs(), x.double().abs().mean(0))
    error = (grads["weight"] - exact).abs()
    assert bool((error <= bound).all())
    assert error.max() > 1e-6 * bound.max()  # it was rounded


def test_no_cast_is_kept_from_one_use_or_transform_to_the_next():
    """The layer is used twice, where a cache of casts would hand the first one's graph to the second."""
    model = made(Observed)
    model.norm = torch.nn.Tanh()
    loss_fn = module_loss(model, lambda model, x: (model(x).square().mean(), len(x)), autocast=LOW)
    params = dict(model.named_parameters())
    others = {name: 2 * tensor.detach() for name, tensor in params.items()}
    x = rows(8, 3)
    for values in (params, others, params):
        _, expected = value_and_grad(loss_fn, values, {}, x, key=Key(0), backend="autograd")
        _, actual = value_and_grad(loss_fn, values, {}, x, key=Key(0), backend="func")
        assert torch.equal(flat(actual), flat(expected))

    def loss(values: dict[str, Tensor]) -> Tensor:
        return loss_fn(values, {}, x, key=Key(0), train=False).loss

    both = vmap(grad(loss))({name: torch.stack([params[name].detach(), others[name]]) for name in params})
    for number, values in enumerate((params, others)):
        assert difference({name: both[name][number] for name in both}, grad(loss)(values)) < 4 * U


OPTIONS: dict[str, Any] = {
    "rnn_layer_sizes": (16, 12),
    "nb_previous_dirs": 1,
    "input_embedding_key": "nn_embedding",
    "input_embedded_size": 8,
    "use_layer_normalization": True,
    "dropout": 0.2,
}


@pytest.mark.parametrize("rnn_key", ["lstm", "gru"])
@pytest.mark.parametrize("dg_key", DIRECTION_GETTERS)
def test_the_loss_and_gradient_of_every_getter_are_near_those_in_float32(dg_key, rnn_key):
    model = made(Learn2Track, NUM_FEATURES, dg_key=dg_key, rnn_key=rnn_key, **OPTIONS)
    params = dict(model.named_parameters())
    results = []
    for autocast in (None, LOW):
        loss_fn = module_loss(model, compute_batch_loss, autocast=autocast)
        results.append(value_and_grad(loss_fn, params, {}, some_batch(0, 30), key=Key(3)))
    (full, full_grads), (low, low_grads) = results
    assert low.loss.dtype == torch.float32
    assert low.loss.isfinite()
    assert low.loss != full.loss
    assert low.loss.item() == pytest.approx(full.loss.item(), rel=4 * U)
    assert {gradient.dtype for gradient in low_grads.values()} == {torch.float32}
    assert difference(low_grads, full_grads) < 4 * U


def test_a_getters_outputs_are_finer_than_bfloat16():
    """Otherwise rounding would affect a density that is narrow relative to its mean."""
    model = made(Learn2Track, NUM_FEATURES, dg_key="gaussian", **OPTIONS)
    outputs = autocast_forward(model, LOW)(some_batch(0, 10))
    assert not torch.equal(outputs, outputs.bfloat16().float())


@pytest.mark.parametrize("rnn_key", ["lstm", "gru"])
def test_all_ways_to_run_a_recurrent_layer_take_the_products_in_bfloat16_and_keep_states_in_float32(rnn_key):
    layer, x, sizes = made(RecurrentLayer, rnn_key, 6, 5), rows(20, 6).requires_grad_(), [8, 7, 5]
    factors = rows(20, 5, seed=1)

    def results(outputs: Tensor) -> tuple[Tensor, ...]:
        return outputs, *torch.autograd.grad((outputs * factors).sum(), [x, *layer.weights])

    with torch.autocast("cpu", LOW):
        packed, state = layer.run(x, sizes)
        lengths = torch.tensor([3] * 5 + [2] * 2 + [1])
        compiled, _ = layer.run(x, lengths)
        (mapped,) = vmap(lambda x: layer(x, sizes))(x[None])
    assert {packed.dtype, *(part.dtype for part in state)} == {torch.float32}
    ih, hh, *biases = layer.weights
    zeros = (torch.zeros(8, 5),) * len(state)
    plain, _ = plain_scan(rnn_key, x, sizes, (ih.to(LOW), hh.to(LOW), *biases), zeros)
    expected, full = results(plain), results(layer(x, sizes))
    for outputs in (packed, compiled, mapped):
        # The products are rounded to 8 bits, so another order of sums may tip one over.
        torch.testing.assert_close(results(outputs), expected, rtol=U, atol=U / 4)
    for actual, exact in zip(expected, full, strict=True):
        assert 0 < (actual - exact).norm() < 2 * U * exact.norm()


def test_a_cell_adds_up_steps_that_bfloat16_would_lose():
    """Gates open or half open by their biases alone: each of 1000 steps adds 2**-10, which a sum of 8 bits above 0.25
    rounds away."""
    layer = RecurrentLayer("lstm", 1, 1)
    state = {name: torch.zeros_like(tensor) for name, tensor in layer.state_dict().items()}
    step = torch.tensor(2.0**-9).atanh()  # times the input gate of 1/2
    state["bias_ih_l0"] = torch.tensor([0.0, 40.0, float(step), 0.0])
    layer.load_state_dict(state)
    with torch.autocast("cpu", LOW):
        _, (_, cell) = layer.run(torch.zeros(1000, 1), [1] * 1000)
    assert cell.item() == pytest.approx(1000 * 2.0**-10, rel=1e-5)


@pytest.mark.compiles
def test_a_compiled_step_is_one_graph_and_near_an_eager_one():
    model = made(Learn2Track, NUM_FEATURES, **{**OPTIONS, "rnn_layer_sizes": (6,), "dg_args": {"dropout": 0.2}})
    options = {"loss_fn": module_loss(model, compute_batch_loss, autocast=LOW), "optimizer": sgd()}
    compiled, eager = jit_step(**options, dynamic=True, backend="eager"), partial(train_step, **options)
    start = init_state(model, sgd(), seed=0)
    for number, size in enumerate((6, 3, 1)):
        ends, sums = zip(*(step(start, some_batch(number, size), lr=1.0) for step in (compiled, eager)), strict=True)
        assert sums[0]["loss"] == pytest.approx(sums[1]["loss"], rel=U)
        moves = [{name: param - start.params[name] for name, param in end.params.items()} for end in ends]
        assert difference(*moves) < U / 16  # without autocast it is above U / 4
    assert (compiled.eager_reason, compiled.num_compilations) == (None, 1)


def test_members_of_an_ensemble_are_near_separate_runs():
    model = made(Learn2Track, NUM_FEATURES, **OPTIONS)
    step = {"loss_fn": module_loss(model, compute_batch_loss, autocast=LOW), "optimizer": adam(), "lr": 0.01}
    states = [init_state(model, adam(), seed=seed) for seed in (1, 2)]
    ensemble, metrics = ensemble_step(stack_states(states), some_batch(0, 20), **step)
    for number, state in enumerate(states):
        _, own = train_step(state, some_batch(0, 20), **step)
        assert torch.as_tensor(metrics["loss"].total)[number].item() == pytest.approx(own["loss"].total, rel=U)
        assert {leaf.dtype for leaf in member(ensemble, number).params.values()} == {torch.float32}


def test_shards_add_up_in_float32():
    model, x = made(Observed), rows(16, 3)
    loss_fn = module_loss(model.linear, lambda model, x: (model(x).square().mean(), len(x)), autocast=LOW)
    params = dict(model.linear.named_parameters())
    _, whole = value_and_grad(loss_fn, params, {}, x, key=Key(0))
    _, sharded = sharded_value_and_grad()(loss_fn, params, {}, list(x.split(4)), key=Key(0))
    assert {gradient.dtype for gradient in sharded.values()} == {torch.float32}
    assert difference(sharded, whole) < U


TRAIN = (*STOCHASTIC, "--max-epochs", "2", "--keep", "all")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from dwiml_func.cli.main import main

    folder = tmp_path_factory.mktemp("precision")
    data = shutil.copy(PHANTOM, folder / "data.hdf5")
    assert main(["train", str(folder), "low", str(data), *TRAIN, "--precision", "bf16"]) == 0
    assert main(["train", str(folder), "full", str(data), *TRAIN]) == 0
    return folder


def test_a_run_repeats_its_bits_also_resumed_and_they_are_not_those_of_float32(cli, trained, tmp_path):
    options = (*TRAIN[:-4], "--max-epochs", "1", "--keep", "all", "--precision", "bf16")
    assert cli("train", tmp_path, "low", trained / "data.hdf5", *options).code == 0
    assert cli("resume", tmp_path, "low", "--new-max-epochs", "2").code == 0
    assert read_config(tmp_path / "low").training.precision == "bf16"
    assert latest_digest(tmp_path / "low") == latest_digest(trained / "low")
    assert latest_digest(trained / "full") != latest_digest(trained / "low")


def test_verify_replays_it_and_diff_names_the_precision(cli, trained):
    assert cli("verify", trained / "low", "--epoch", "2").code == 0
    outcome = cli("diff", trained / "full", trained / "low")
    assert outcome.code == 1
    assert "precision" in outcome.out


def test_a_fork_may_go_on_in_another_precision(cli, trained):
    for source, precision in (("low", "float32"), ("full", "bf16")):
        outcome = cli("fork", trained / source, f"{source}_other", "--precision", precision, "--from", "1")
        assert (outcome.code, outcome.err) == (0, "")
        assert read_config(trained / f"{source}_other").training.precision == precision
    digests = [latest_digest(trained / name) for name in ("low", "full", "low_other", "full_other")]
    assert len(set(digests)) == 4


def test_validation_is_in_the_precision_of_the_run_and_a_finished_model_is_judged_in_float32(trained):
    model = load_model(trained / "low" / "best_model")
    losses = []
    for precision in ("float32", "bf16"):
        config = read_config(trained / "low")
        parts = prepare(replace(config, training=replace(config.training, precision=precision)))
        state = parts.first_state().replace(params=dict(model.module.named_parameters()))
        sums: Any = {}
        assert parts.valid is not None
        for batch in parts.valid(state.key, 0, 0):
            sums = add_metrics(sums, parts.eval_step(state, batch))
        losses.append(read_means(sums)["loss"])
    full, low = losses
    validation = json.loads((trained / "low" / "logs" / "metrics.jsonl").read_text().splitlines()[-1])
    assert low in validation.values()
    assert full not in validation.values()
    evaluated = evaluate_model(model, open_dataset(PHANTOM, "validation")).loss
    assert abs(evaluated - full) < abs(low - full) / 3  # batches of another size, so not bitwise identical


def test_an_ensemble_and_shards_train_in_it(cli, trained, tmp_path):
    options = (*TRAIN[:-4], "--max-epochs", "1", "--precision", "bf16")
    assert cli("train", tmp_path, "both", trained / "data.hdf5", *options, "--num-models", "2").code == 0
    assert read_config(tmp_path / "both" / "1").training.precision == "bf16"
    assert cli("train", tmp_path, "shards", trained / "data.hdf5", *options, "--num-shards", "2").code == 0


def test_an_unknown_precision_is_refused_with_those_there_are(cli, tmp_path):
    cli("train", tmp_path, "run", PHANTOM, "--precision", "fp16").check_refusal("precision", "float32", "bf16")
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"training": {"precision": "half"}}))
    cli("train", tmp_path, "run", PHANTOM, "--config", path).check_refusal("training.precision", "'half'", "bf16")
    assert not (tmp_path / "run").exists()


def test_a_config_from_before_there_was_a_choice_means_float32():
    data = CONFIG.to_dict()
    del data["training"]["precision"]
    assert config_from_json(json.dumps(data)).training.precision == TrainingConfig().precision == "float32"
