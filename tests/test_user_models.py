"""Claims about ordinary models and losses of users: each trains as torch trains it, or is refused in a sentence."""

from __future__ import annotations

import copy
import random
import warnings
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from dwiml_func import (
    Key,
    LossOut,
    accumulate,
    adam,
    adamw,
    by_name,
    chain,
    ema,
    ensemble_step,
    eval_step,
    init_state,
    jit_step,
    module_loss,
    sgd,
    stack_states,
    train_and_validate,
    train_step,
)
from dwiml_func.checkpoint import state_digest

BATCH = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))


def loss(model: Any, x: Tensor) -> tuple[Tensor, int]:
    return (model(x) - 1).square().mean(), len(x)


def step(model: nn.Module, compute: Callable[..., Any] = loss, **options: Any) -> Any:
    state = init_state(model, sgd(), seed=0)
    return train_step(state, BATCH, loss_fn=module_loss(model, compute), optimizer=sgd(), lr=0.1, **options)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def either_step(state: Any, loss_fn: Any, is_training: bool) -> None:
    if is_training:
        train_step(state, BATCH, loss_fn=loss_fn, optimizer=sgd(), lr=0.1)
    else:
        eval_step(state, BATCH, loss_fn=loss_fn)


class With(nn.Module):
    """A linear model whose forward first calls a function on the module."""

    cache: dict[str, Tensor]
    log: list[int]

    def __init__(self, before: Callable[[Any], Any]) -> None:
        super().__init__()
        self.linear, self.before = nn.Linear(4, 1), before

    def forward(self, x: Tensor) -> Tensor:
        self.before(self)
        return self.linear(x)


STEPS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "train_step": lambda state, batch, loss_fn: train_step(state, batch, loss_fn=loss_fn, optimizer=sgd(), lr=0.1),
    "func": lambda state, batch, loss_fn: train_step(
        state, batch, loss_fn=loss_fn, optimizer=sgd(), lr=0.1, backend="func"
    ),
    "jit_step": lambda state, batch, loss_fn: jit_step(loss_fn=loss_fn, optimizer=sgd(), backend="eager")(
        state, batch, lr=0.1
    ),
    "ensemble_step": lambda state, batch, loss_fn: ensemble_step(
        stack_states([state] * 2), batch, loss_fn=loss_fn, optimizer=sgd(), lr=0.1
    ),
}


@pytest.mark.parametrize("run", STEPS.values(), ids=STEPS.keys())
def test_a_loss_of_the_enclosing_scripts_module_is_refused(run: Callable[..., Any]) -> None:
    model = mlp()
    loss_fn = module_loss(model, lambda _, x: loss(model, x))
    with pytest.raises(ValueError, match="depends on other tensors only"):
        run(init_state(model, sgd(), seed=0), BATCH, loss_fn)


@pytest.mark.parametrize("run", STEPS.values(), ids=STEPS.keys())
def test_a_captured_head_that_no_state_holds_is_refused(run: Callable[..., Any]) -> None:
    model, head = nn.Linear(4, 4), nn.Linear(4, 1)
    loss_fn = module_loss(model, lambda model, x: (head(model(x)).square().mean(), len(x)))
    with pytest.raises(ValueError, match=r"not in the state, of shapes \(1, 4\), \(1,\)"):
        run(init_state(model, sgd(), seed=0), BATCH, loss_fn)


def test_a_gradient_penalty_trains_as_in_torch() -> None:
    def penalized(model: Any, x: Tensor) -> tuple[Tensor, int]:
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(loss(model, x)[0], x, create_graph=True)
        return loss(model, x)[0] + slope.square().sum(), len(x)

    model = mlp()
    new, _ = step(model, penalized)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    penalized(model, BATCH)[0].backward()
    optimizer.step()
    assert all(torch.equal(new.params[name], parameter) for name, parameter in model.named_parameters())


def test_a_parameter_that_one_batch_does_not_use_is_fine() -> None:
    model = nn.ModuleDict({"used": nn.Linear(4, 1), "unused": nn.Linear(4, 1)})
    new, _ = step(model, lambda model, x: (model["used"](x).square().mean(), len(x)))
    assert torch.equal(new.params["unused.weight"], model["unused"].weight)  # type: ignore[arg-type]
    assert not torch.equal(new.params["used.weight"], model["used"].weight)  # type: ignore[arg-type]


class Checkpointed(nn.Module):
    def __init__(self, saves_memory: bool, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 4))
        self.head, self.saves_memory = nn.Linear(4, 1), saves_memory
        self.options: dict[str, Any] = {"use_reentrant": False, **options}

    def forward(self, x: Tensor) -> Tensor:
        body: Any = checkpoint(self.body, x, **self.options) if self.saves_memory else self.body(x)
        return self.head(body)


def test_activation_checkpointing_computes_again_with_the_states_tensors() -> None:
    digests = []
    for saves_memory, make in ((False, train_step), (True, train_step), (True, jit_step)):
        model = Checkpointed(saves_memory)
        options: dict[str, Any] = {"loss_fn": module_loss(model, loss), "optimizer": adam()}
        run = jit_step(**options, backend="eager") if make is jit_step else partial(train_step, **options)
        state = init_state(model, adam(), seed=0)
        for _ in range(5):
            state, _ = run(state, BATCH, lr=0.1)
        digests.append(state_digest(state))
    assert digests[1:] == digests[:1] * 2


@pytest.mark.parametrize("name", ["train_step", "jit_step"])
def test_a_gradient_of_other_random_numbers_than_the_loss_is_refused(name: str) -> None:
    state = init_state(model := Checkpointed(True, preserve_rng_state=False), sgd(), seed=0)
    with pytest.raises(ValueError, match=r"draws random numbers of its own.* preserve_rng_state=True"):
        STEPS[name](state, BATCH, module_loss(model, loss))


class Reentrant(nn.Module):
    """Blocks of the reentrant kind, after a parameter of the model or after an input alone."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.first, self.block, self.last = first, nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Any:
        before = self.first(x).clone()
        if not before.requires_grad:
            before.requires_grad_(self.training)
        return self.last(checkpoint(lambda x: self.block(x).tanh(), before, use_reentrant=True))


@pytest.mark.parametrize("first", [nn.Identity(), nn.Linear(4, 4)], ids=["after the input", "after a parameter"])
def test_reentrant_activation_checkpoints_train_as_in_torch(first: nn.Module) -> None:
    torch.manual_seed(0)
    model = Reentrant(first)
    own, _ = step(model)
    loss(model, BATCH)[0].backward()
    torch.optim.SGD(model.parameters(), lr=0.1, foreach=False).step()
    for name, parameter in model.named_parameters():
        assert torch.equal(own.params[name], parameter), name
        assert parameter.grad is not None


def test_lazy_modules_are_refused_until_they_have_shapes() -> None:
    model = nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.Linear(8, 1))
    with pytest.raises(ValueError, match=r"0\.bias.* of a lazy module. Call the module once on a batch"):
        init_state(model, sgd(), seed=0)
    model(BATCH)
    assert step(model)[0].step == 1


AUX = {
    "a list": [1.0],
    "a text": "accuracy",
    "None": None,
    "three numbers": {"a": (1.0, 2.0, 3.0)},
    "a text as value": {"a": "0.5"},
    "a number as name": {1: 0.5},
    "nested": {"a": {"b": 1.0}},
    "complex": {"a": 1j},
    "a complex tensor": {"a": torch.tensor(1j)},
    "a list of two": {"a": [1.0, 2.0]},
    "None as value": {"a": None},
    "a weight that is a text": {"a": (1.0, "4")},
    "an array": {"a": np.zeros(2)},
}


@pytest.mark.parametrize("aux", AUX.values(), ids=AUX.keys())
def test_other_auxiliary_metrics_are_refused_in_a_sentence(aux: Any) -> None:
    with pytest.raises(ValueError, match=r"Expected .*auxiliary metric.* Received: "):
        step(mlp(), lambda model, x: (*loss(model, x), aux))


@pytest.mark.parametrize("value", [2, 2.0, True, np.float32(2), torch.tensor(2), (2.0, 3), (torch.tensor(2.0), 3)])
def test_auxiliary_metrics_are_numbers_of_any_kind(value: Any) -> None:
    _, metrics = step(mlp(), lambda model, x: (*loss(model, x), {"a": value}))
    mean = value[0] if isinstance(value, tuple) else value
    assert metrics["a"].total / metrics["a"].weight == float(mean)


def _count(model: Any) -> None:
    model.kept["inner"]["count"] += 1


def _grow(model: Any) -> None:
    model.kept.append(1)


def _add(model: Any) -> None:
    model.kept[0] += 1


STATEFUL: dict[str, tuple[Callable[[Any], None], Any, Callable[[Any], float]]] = {
    "a nested dict": (_count, lambda: {"inner": {"count": 0}}, lambda model: float(model.kept["inner"]["count"])),
    "a deque": (_grow, lambda: deque(), lambda model: float(len(model.kept))),
    "an array": (_add, lambda: np.zeros(1), lambda model: float(model.kept[0])),
    "a tensor in a list": (
        lambda model: model.kept[0].add_(1),
        lambda: [torch.zeros(1)],
        lambda model: model.kept[0].item(),
    ),
}


@pytest.mark.parametrize(("change", "make", "read"), STATEFUL.values(), ids=STATEFUL.keys())
def test_what_is_changed_in_place_and_feeds_the_next_batch_is_refused(change, make, read) -> None:
    model = With(change)
    model.kept = make()
    with pytest.raises(ValueError, match=r"keep nothing between calls|keeps something between batches"):
        step(model, lambda model, x: ((model(x) - read(model)).square().mean(), len(x)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 8)), nn.Linear(8, 1)),
        lambda: nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)), nn.Linear(4, 1)),
        lambda: nn.DataParallel(nn.Linear(4, 1)),
        lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, momentum=None), nn.Linear(8, 1)),
        lambda: nn.Sequential(torch.jit.script(nn.Linear(4, 8)), nn.Linear(8, 1)),
        lambda: torch.compile(nn.Linear(4, 1), backend="eager"),
    ],
    ids=["spectral_norm", "orthogonal", "DataParallel", "BatchNorm without momentum", "TorchScript", "torch.compile"],
)
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_modules_that_compute_or_keep_more_than_parameters_train_as_in_torch(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = make()
    loss_fn, state = module_loss(model, loss), init_state(model, sgd(), seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
    for _ in range(3):
        state, _ = train_step(state, BATCH, loss_fn=loss_fn, optimizer=sgd(), lr=0.1)
        optimizer.zero_grad()
        loss(model, BATCH)[0].backward()
        optimizer.step()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert torch.equal({**state.params, **state.buffers}[name], tensor), name


def test_submodules_in_evaluation_mode_stay_in_it() -> None:
    backbone = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.9)).eval()
    model = nn.Sequential(backbone, nn.BatchNorm1d(4), nn.Linear(4, 1))
    new, _ = step(model)
    assert new.buffers["0.0.num_batches_tracked"] == 0
    assert new.buffers["1.num_batches_tracked"] == 1
    whole, _ = step(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1)).eval())  # training means train mode
    assert whole.buffers["0.num_batches_tracked"] == 1


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("write", ["data", "no_grad"])
def test_a_forward_that_writes_into_parameters_is_refused_and_the_state_is_whole(is_training, write) -> None:
    def clamp(module: Any) -> None:
        with torch.no_grad():
            weight = module.linear.weight
            (weight.data if write == "data" else weight).clamp_(-0.01, 0.01)

    model = With(clamp)
    state, loss_fn = init_state(model, sgd(), seed=0), module_loss(model, loss)
    before = state_digest(state)
    with pytest.raises(ValueError, match=r"writes into (the parameter )?linear\.weight"):
        either_step(state, loss_fn, is_training)
    assert state_digest(state) == before


def test_a_loss_that_writes_a_single_value_is_refused() -> None:
    def writes(params: Any, buffers: Any, batch: Tensor, *, key: Any, train: bool) -> LossOut:
        with torch.no_grad():
            params["weight"][0, 1] += 1
        return LossOut((batch @ params["weight"].T).square().mean(), len(batch), buffers, {})

    state = init_state(nn.Linear(4, 1, bias=False), sgd(), seed=0)
    with pytest.raises(ValueError, match="writes into weight of the state"):
        train_step(state, BATCH, loss_fn=writes, optimizer=sgd(), lr=0.1)


def _counts(module: Any) -> None:
    module.count = module.count + 1


def _adds_in_place(module: Any) -> None:
    module.running.add_(1)


KEEPERS: dict[str, tuple[Callable[[Any], None], str, Any]] = {
    "counter": (_counts, "count", 0),
    "tensor in place": (_adds_in_place, "running", torch.zeros(())),
}


@pytest.mark.parametrize(("before", "name", "value"), KEEPERS.values(), ids=KEEPERS.keys())
def test_a_model_that_keeps_something_between_batches_is_refused(before, name, value) -> None:
    model = With(before)
    setattr(model, name, value)
    with pytest.raises(ValueError, match=f"keeps something between batches in {name}, outside the training state"):
        step(model)


def _registers(module: Any) -> None:
    if not hasattr(module, "running"):
        module.register_buffer("running", torch.zeros(()))
    module.running = module.running + 1


def test_a_buffer_that_the_forward_registers_is_no_hidden_state() -> None:
    def read(model: Any, x: Tensor) -> tuple[Tensor, int]:
        return (model(x) - model.running).square().mean(), len(x)

    with pytest.raises(ValueError, match="keeps something between batches in running"):
        step(With(_registers), read)


def test_a_list_that_feeds_the_next_batch_is_refused() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.seen = nn.Linear(4, 1), []

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(1.0)
            return self.linear(x) * sum(self.seen)

    with pytest.raises(ValueError, match="keeps something between batches in seen"):
        step(Model())


def test_what_training_leaves_for_evaluation_in_an_attribute_is_refused() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.scale = nn.Linear(4, 1), torch.ones(())

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.scale = x.detach().std()
            return self.linear(x / self.scale)

    model = Model()
    loss_fn = module_loss(model, loss)
    state, _ = train_step(init_state(model, sgd(), seed=0), BATCH, loss_fn=loss_fn, optimizer=sgd(), lr=0.1)
    with pytest.raises(ValueError, match="between batches in scale"):
        eval_step(state, BATCH, loss_fn=loss_fn)


def test_caches_and_what_is_kept_for_a_look_are_no_state() -> None:
    def keep(module: Any) -> None:
        module.cache.setdefault("mask", torch.ones(3))
        module.log.append(len(module.cache))
        module.last = module.linear.weight.detach().sum()
        if not hasattr(module, "mask"):
            module.mask = torch.ones(3)

    digests = []
    for before in (keep, lambda module: None):
        torch.manual_seed(0)
        model = With(before)
        model.cache, model.log = {}, []
        state, loss_fn = init_state(model, sgd(), seed=0), module_loss(model, loss)
        for _ in range(3):
            state, _ = train_step(state, BATCH, loss_fn=loss_fn, optimizer=sgd(), lr=0.1)
        eval_step(state, BATCH, loss_fn=loss_fn)
        digests.append(state_digest(state))
        assert (model.cache, model.log) == ({}, [])
    assert digests[0] == digests[1]


@pytest.mark.parametrize("draw", [random.random, np.random.rand], ids=["Python", "numpy"])
def test_global_generators_of_python_and_numpy_are_refused_whatever_they_give(draw: Callable[[], float]) -> None:
    with pytest.raises(ValueError, match="draws from the global generator of Python or numpy"):
        step(mlp(), lambda model, x: (loss(model, x)[0] * (1 if draw() >= 0 else 2), len(x)))


@pytest.mark.parametrize("drawn_at", [(0,), (1,)])
def test_numbers_that_another_thread_draws_meanwhile_are_no_error_of_the_loss(drawn_at: tuple[int, ...]) -> None:
    """A loss that draws does so each time it is called."""
    calls = iter(range(9))

    def compute(model: Any, x: Tensor) -> tuple[Tensor, int]:
        if next(calls) in drawn_at:
            random.random()
        return loss(model, x)

    step(mlp(), compute)


@pytest.mark.parametrize("make", [lambda: torch.Generator(), lambda: None], ids=["own", "captured"])
def test_random_numbers_from_another_generator_are_refused(make) -> None:
    captured, own = torch.Generator(), make()

    def compute(model: Any, x: Tensor) -> tuple[Tensor, int]:
        generator = captured if own is None else model.generator
        return (model(x) * torch.rand((), generator=generator)).square().mean(), len(x)

    model = nn.Linear(4, 1)
    model.generator = own  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"Called twice|between batches"):
        step(model, compute)


@pytest.mark.parametrize("hook", ["register_hook", "register_post_accumulate_grad_hook"])
def test_gradient_hooks_on_parameters_are_refused(hook: str) -> None:
    model = mlp()
    getattr(model[0].weight, hook)(lambda gradient: None)  # type: ignore[index]
    with pytest.raises(ValueError, match=r"The parameter 0\.weight has a gradient hook"):
        module_loss(model, loss)


def test_pruned_and_weight_normed_models_train_as_in_torch() -> None:
    def pruned() -> nn.Module:
        model = mlp()
        prune.l1_unstructured(model[0], "weight", 0.5)  # type: ignore[index]
        return model

    def normed() -> nn.Module:
        model = mlp()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nn.utils.weight_norm(model[0])  # type: ignore[index]
        return model

    for make in (pruned, normed):
        model = make()
        state, loss_fn = init_state(model, sgd(), seed=0), module_loss(model, loss)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            state, _ = train_step(state, BATCH, loss_fn=loss_fn, optimizer=sgd(), lr=0.1)
            optimizer.zero_grad()
            loss(model, BATCH)[0].backward()
            optimizer.step()
        assert all(torch.equal(p, state.params[name]) for name, p in model.named_parameters())


def test_a_loss_may_change_or_consume_its_batch() -> None:
    def takes_out(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        x = batch.pop("x")
        return loss(model, x.sub_(x.mean()))

    def consumes(model: Any, batch: Any) -> tuple[Tensor, int]:
        return loss(model, next(batch))

    results = []
    for compute, batch in (
        (loss, BATCH - BATCH.mean()),
        (takes_out, {"x": BATCH.clone()}),
        (consumes, iter([BATCH - BATCH.mean()])),
    ):
        model = mlp()
        state, loss_fn = init_state(model, sgd(), seed=0), module_loss(model, compute)
        results.append(state_digest(train_step(state, batch, loss_fn=loss_fn, optimizer=sgd(), lr=0.1)[0]))
    assert len(set(results)) == 1


def test_frozen_parameters_are_the_very_tensors_after_a_step() -> None:
    model = mlp()
    model[0].weight.requires_grad_(False)  # type: ignore[index]
    state = init_state(model, sgd(), seed=0)
    new, _ = train_step(state, BATCH, loss_fn=module_loss(model, loss), optimizer=sgd(), lr=0.1)
    assert new.buffers["0.weight"] is not None
    assert new.buffers["0.weight"].data_ptr() == state.buffers["0.weight"].data_ptr()


def test_runs_in_threads_do_not_take_each_others_random_numbers() -> None:
    model = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 1))

    def run(seed: int) -> str:
        loss_fn, state = module_loss(model, loss), init_state(model, adam(), seed=seed)
        for _ in range(100):
            state, _ = train_step(state, BATCH, loss_fn=loss_fn, optimizer=adam(), lr=0.01)
        return state_digest(state)

    alone = [run(seed) for seed in range(3)]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(run, range(3))) == alone


@pytest.mark.parametrize("run", STEPS.values(), ids=STEPS.keys())
def test_a_loss_that_calls_backward_is_refused(run: Callable[..., Any]) -> None:
    def backward(model: Any, x: Tensor) -> tuple[Tensor, int]:
        model[0].bias.sum().backward()  # one parameter is enough
        return loss(model, x)

    with pytest.raises(ValueError, match=r"The loss function calls backward\(\), whose gradients no step would use"):
        run(init_state(model := mlp(), sgd(), seed=0), BATCH, module_loss(model, backward))


def test_what_torch_func_cannot_read_is_told_where_it_is_asked_for() -> None:
    model = With(lambda module: copy.deepcopy(module.linear).requires_grad_(False))
    step(model)
    with pytest.raises(ValueError, match=r"torch\.func cannot differentiate the loss .* Use backend='autograd'"):
        step(model, backend="func")
    ensemble = stack_states([init_state(model, sgd(), seed=0)] * 2)
    with pytest.raises(ValueError, match=r"The model's .* cannot run for all members of an ensemble at once"):
        ensemble_step(ensemble, BATCH, loss_fn=module_loss(model, loss), optimizer=sgd(), lr=0.1)


@pytest.mark.parametrize("run", STEPS.values(), ids=STEPS.keys())
def test_sparse_gradients_are_refused(run: Callable[..., Any]) -> None:
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Linear(4, 1))
    loss_fn = module_loss(model, lambda model, x: (model(x).square().mean(), len(x)))
    with pytest.raises(ValueError, match=r"Expected dense gradients\. Received: a sparse one of 0\.weight"):
        run(init_state(model, sgd(), seed=0), torch.arange(8), loss_fn)


def _hook(module: Any, x: Tensor) -> Tensor:
    out = module.linear(x)
    if out.requires_grad:
        out.register_hook(lambda gradient: 2 * gradient)
    return out


def _kept_products() -> Any:
    return create_selective_checkpoint_contexts([torch.ops.aten.mm.default])


def _with_backward_hook() -> nn.Module:
    model = mlp()
    model[1].register_full_backward_hook(lambda module, before, after: (2 * before[0],))  # type: ignore[index]
    return model


PASSED_OVER: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any]]] = {
    "a module's hook": (_with_backward_hook, loss),
    "a tensor's hook": (lambda: With(lambda module: None), lambda model, x: (_hook(model, x).square().mean(), len(x))),
    "checkpoints": (lambda: Checkpointed(saves_memory=True), loss),
    "selective checkpoints": (lambda: Checkpointed(saves_memory=True, context_fn=_kept_products), loss),
}


@pytest.mark.parametrize(("make", "compute"), PASSED_OVER.values(), ids=PASSED_OVER.keys())
def test_an_ensemble_refuses_what_would_not_act_in_its_backward_pass(make, compute) -> None:
    state = init_state(model := make(), sgd(), seed=0)
    with pytest.raises(
        ValueError, match=r"backward hook|Hooks of tensors|activations again|cannot map an operation"
    ):  # the last: torch 2.11
        STEPS["ensemble_step"](state, BATCH, module_loss(model, compute))


def test_a_model_is_told_the_same_of_gradients_in_an_ensemble_as_alone() -> None:
    model = nn.Linear(4, 1)
    loss_fn = module_loss(model, lambda m, x: (m(x).square().mean() * (3 if m(x).requires_grad else 1), len(x)))
    ensemble = stack_states([state := init_state(model, sgd(), seed=0)] * 2)
    _, one = STEPS["train_step"](state, BATCH, loss_fn)
    _, both = ensemble_step(ensemble, BATCH, loss_fn=loss_fn, optimizer=sgd(), lr=0.1)
    assert float(both["loss"].total[1]) == pytest.approx(one["loss"].total)  # type: ignore[index]


def _random_loss(model: Any, x: Tensor) -> tuple[Tensor, int]:
    return torch.distributions.Normal(model(x), 1.0).rsample().square().mean(), len(x)


def test_an_ensemble_names_the_part_of_a_model_that_cannot_be_mapped() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(4, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x)[0]

    models = {"LSTM": (Recurrent(), loss), "The loss": (nn.Linear(4, 4), _random_loss)}
    for part, (model, compute) in models.items():
        ensemble = stack_states([init_state(model, adam(), seed=seed) for seed in range(2)])
        loss_fn = module_loss(model, compute)
        with pytest.raises(ValueError, match=f"{part} cannot run for all members of an ensemble at once"):
            ensemble_step(ensemble, torch.randn(2, 5, 4), loss_fn=loss_fn, optimizer=adam(), lr=0.1)


@pytest.mark.parametrize("run", [STEPS[name] for name in ("train_step", "jit_step", "ensemble_step")])
def test_a_step_with_another_optimizer_than_the_states_is_refused(run: Callable[..., Any]) -> None:
    model = mlp()
    optimizers = adam(), sgd(momentum=0.9), chain(accumulate(2), sgd()), ema(sgd(), decay=0.9)
    for optimizer in optimizers:
        with pytest.raises(ValueError, match=r"made for another optimizer: of their trees, .* only one"):
            run(init_state(model, optimizer, seed=0), BATCH, module_loss(model, loss))


@pytest.mark.parametrize("run", [train_step, ensemble_step, jit_step])
def test_an_optimizer_state_of_other_shapes_is_refused(run: Callable[..., Any]) -> None:
    optimizer, loss_fn = adam(), module_loss(model := mlp(), loss)
    state = init_state(model, optimizer, seed=0)
    wide = tree_map(lambda leaf: torch.cat([leaf, leaf]) if leaf.dim() else leaf, state.opt_state)
    state, step = state.replace(opt_state=wide), {"loss_fn": loss_fn, "optimizer": optimizer}
    state = stack_states([state]) if run is ensemble_step else state
    with pytest.raises(ValueError, match=r"expected exp_avg/0\.weight of shape \(8, 4\), .* Received: \(16, 4\)"):
        run(**step, backend="eager")(state, BATCH, lr=0.1) if run is jit_step else run(state, BATCH, **step, lr=0.1)


def test_another_tensor_that_requires_a_gradient_is_left_without_one() -> None:
    weight = torch.ones((), requires_grad=True)
    step(mlp(), lambda model, x: ((model(x) * weight).square().mean(), len(x)))
    assert weight.grad is None


def test_a_state_of_other_groups_is_refused() -> None:
    groups: dict[str, Any] = {"0.*": {"lr": 0.5}, "2.*": {}}
    optimizer, other = by_name(adam, groups), by_name(adam, dict(reversed(groups.items())))
    state = init_state(model := mlp(), optimizer, seed=0)
    with pytest.raises(ValueError, match=r"another optimizer: of their trees, 0/exp_avg/0\.bias, .* only one"):
        train_step(state, BATCH, loss_fn=module_loss(model, loss), optimizer=other, lr=0.1)


@pytest.mark.parametrize("run", STEPS.values(), ids=STEPS.keys())
def test_buffers_that_grow_are_refused_since_no_checkpoint_of_them_could_be_restored(run: Callable[..., Any]) -> None:
    for change, named in (
        (lambda seen: torch.cat([seen, torch.ones(1)]), r"float32 \(2,\)"),
        (lambda seen: seen.double(), r"float64 \(1,\)"),
    ):
        model = With(lambda module, change=change: setattr(module, "seen", change(module.seen)))
        model.register_buffer("seen", torch.zeros(1))
        with pytest.raises(ValueError, match=rf"buffers that keep their shapes.*seen of torch\.{named} in place of"):
            run(init_state(model, sgd(), seed=0), BATCH, module_loss(model, loss))


@pytest.mark.parametrize("name", ["step", "learning_rate", "weight_decay", "grad_norm"])
def test_a_metric_of_a_name_that_logs_have_already_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"reserved metric name '{name}'"):
        step(mlp(), lambda model, x: (*loss(model, x), {name: 1.0}))


@pytest.mark.parametrize("name", STEPS)
def test_inference_mode_is_for_evaluation_only(name: str) -> None:
    state = init_state(model := nn.Sequential(nn.BatchNorm1d(4), mlp()), sgd(), seed=0)
    loss_fn, other = module_loss(model, loss), module_loss(model, loss)
    expected = eval_step(state, BATCH, loss_fn=loss_fn)
    with torch.inference_mode():
        assert eval_step(state, BATCH, loss_fn=loss_fn) == eval_step(state, BATCH, loss_fn=other) == expected
        with pytest.raises(ValueError, match=r"needs gradients, which torch.inference_mode switches off"):
            STEPS[name](state, BATCH, loss_fn)


def validated_by(valid: Any, state: Any, model: nn.Module) -> Any:
    loss_fn = module_loss(model, loss)
    run: dict[str, Any] = {"step": partial(train_step, loss_fn=loss_fn, optimizer=sgd())}
    run |= {"eval_step": partial(eval_step, loss_fn=loss_fn), "learning_rate": 0.1, "max_epochs": 1}
    return train_and_validate(state, train=lambda *_: [BATCH], valid=valid, **run)


WRONG: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "a criterion": (lambda state, model: module_loss(model, nn.MSELoss()), r"Received: MSELoss\(\)\. Call the model"),
    "swapped": (lambda state, model: module_loss(loss, model), "Expected a torch.nn.Module. Received: function"),  # type: ignore[arg-type]
    "a plain loss": (lambda state, model: STEPS["train_step"](state, BATCH, loss), "as module_loss makes one"),
    "a module as state": (lambda state, model: STEPS["train_step"](model, BATCH, loss), "Expected a TrainState"),
    "a state as ensemble": (lambda state, model: ensemble_step(state, BATCH, loss_fn=None, optimizer=sgd(), lr=0.1),  # type: ignore[arg-type]
                            "Expected an EnsembleState"),
    "a validation of nothing": (lambda state, model: list(validated_by(lambda *_: None, state, model)),
                                "Expected a source valid that returns batches. Received: NoneType"),
    "parameters as module": (lambda state, model: init_state(state.params, sgd(), seed=0), "Expected a torch.nn.Mod"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "named"), WRONG.values(), ids=WRONG.keys())
def test_things_in_the_wrong_place_are_named(call, named) -> None:
    with pytest.raises(TypeError, match=named):
        call(init_state(model := mlp(), sgd(), seed=0), model)


@pytest.mark.parametrize(
    "lr", [-0.1, float("nan"), None, "0.1", True, np.True_, 10**400, [0.1], 0.1j, torch.tensor(float("inf")), adam]
)
@pytest.mark.parametrize("run", [train_step, jit_step, ensemble_step])
def test_a_learning_rate_that_is_none_is_refused_before_the_step(lr: Any, run: Any) -> None:
    state: Any = init_state(model := mlp(), sgd(), seed=0)
    options: dict[str, Any] = {"loss_fn": module_loss(model, loss), "optimizer": sgd()}
    call: Any = jit_step(**options) if run is jit_step else partial(run, **options)
    with pytest.raises(ValueError, match="Expected a learning rate or a weight decay that is finite and at least 0"):
        call(stack_states([state]) if run is ensemble_step else state, BATCH, lr=lr)


@pytest.mark.parametrize(
    "run", [partial(step, mlp()), partial(jit_step, loss_fn=module_loss(mlp(), loss), optimizer=sgd())]
)
def test_a_policy_that_does_not_exist_is_refused(run: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"Expected non_finite 'raise', 'defer', 'skip' or None\. Received: 'ignore'"):
        run(non_finite="ignore")


RETURNS: dict[str, tuple[dict[str, Any], str]] = {
    "a float loss": ({"loss": 0.5}, r"a loss that is a \(\) tensor"),
    "a vector loss": ({"loss": torch.ones(3, requires_grad=True)}, "a scalar loss"),
    "a complex loss": ({"loss": torch.ones((), dtype=torch.complex64)}, "a scalar loss.* a complex tensor"),
    "no weight": ({"weight": None}, "a weight that is a number of points"),
    "a weight below 0": ({"weight": -1}, "finite and at least 0. Received: -1"),
    "a weight not finite": ({"weight": torch.tensor(torch.inf)}, "finite and at least 0. Received: inf"),
    "a weight above all floats": ({"weight": 10**400}, "finite and at least 0. Received: 1000"),
    "a vector metric": ({"aux": {"error": torch.ones(3)}}, r"the auxiliary metric 'error' to be a \(\) tensor"),
    "a metric's weight below 0": ({"aux": {"error": (1.0, -1)}}, "'error' with a weight .* Received: -1"),
    "no buffers": ({"buffers": {}}, "returns all buffers it is given, changed or not. Missing: b"),
}


@pytest.mark.parametrize(("changes", "named"), RETURNS.values(), ids=RETURNS.keys())
@pytest.mark.parametrize("is_training", [True, False])
def test_wrong_returns_of_a_loss_function_are_told(changes, named, is_training) -> None:
    model = nn.Linear(4, 1)
    state = init_state(model, sgd(), seed=0).replace(buffers={"b": torch.ones(())})

    def loss_fn(params: Any, buffers: Any, batch: Any, *, key: Key, train: bool) -> LossOut:
        return LossOut((batch @ params["weight"].T).square().mean(), len(batch), buffers, {})._replace(**changes)

    with pytest.raises(ValueError, match=named):
        either_step(state, loss_fn, is_training)


class TwoHeads(nn.Module):
    """The second is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 1), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_accumulation_leaves_a_parameter_that_nothing_uses_alone_compiled_or_refuses_it() -> None:
    model, optimizer = TwoHeads(), chain(accumulate(2), adamw(weight_decay=0.1))
    loss_fn, state = module_loss(model, loss), init_state(model, optimizer, seed=0)
    compiled = jit_step(loss_fn=loss_fn, optimizer=optimizer, backend="eager")
    eager = state
    for _ in range(4):
        state, _ = compiled(state, BATCH, lr=0.1)
        eager, _ = train_step(eager, BATCH, loss_fn=loss_fn, optimizer=optimizer, lr=0.1)
    assert torch.equal(state.params["unused.weight"], model.unused.weight)
    assert torch.equal(state.params["used.weight"], eager.params["used.weight"])
    with pytest.raises(ValueError, match=r"does not use unused\.weight\. Freeze it"):
        ensemble_step(stack_states([eager, eager]), BATCH, loss_fn=loss_fn, optimizer=optimizer, lr=0.1)
