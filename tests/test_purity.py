"""Claims about the whole core: pure means pure, whatever the model does inside.

A call changes no tensor that came in (identity, version counter, bytes), no global random state of torch, numpy or
python, leaves the user's module alone, and gives equal bytes when it is called again.
"""

import random
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dwiml_func import epoch_fn, eval_epoch_fn, train_and_validate
from dwiml_func.checkpoint.digest import leaf_digest, state_digest, state_leaves
from dwiml_func.core.gradients import value_and_grad
from dwiml_func.core.loss import module_loss
from dwiml_func.core.rng import Key, torch_rng
from dwiml_func.core.state import TrainState, init_state
from dwiml_func.core.step import eval_step, train_step
from dwiml_func.optim.optimizers import adam, radam, sgd
from dwiml_func.types import Metrics


class AssignedBuffer(nn.Module):
    """Keeps a running mean by assigning a new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x)
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * out.detach().mean(dim=0)
        return out - self.mean


class ChangedBuffer(AssignedBuffer):
    """Keeps it by changing the tensor in place, also when it is evaluated."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x)
        mean = self.mean.clone()
        self.mean.mul_(0.9).add_(out.detach().mean(dim=0), alpha=0.1)
        return out - mean


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 5, num_layers=2, dropout=0.4)
        self.out = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(x.view(3, 2, 4))[0]).reshape(6, 3)


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3))
    model[2].weight = model[0].weight  # type: ignore[union-attr]
    return model


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    model[0].weight.requires_grad_(False)  # type: ignore[union-attr]
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)),
    "dropout": lambda: nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3)),
    "batch norm": lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)),
    "assigned buffer": AssignedBuffer,
    "changed buffer": ChangedBuffer,
    "tied": tied,
    "frozen": frozen,
    "lstm": Recurrent,
}


def squared_error(model: nn.Module, batch: tuple[Tensor, Tensor]):
    out = model(batch[0])
    return (out - batch[1]).square().mean(), len(batch[1]), {"size": out.abs().mean()}


class Setting(NamedTuple):
    module: nn.Module
    state: TrainState
    batches: list[tuple[Tensor, Tensor]]
    loss_fn: Any
    train: Any


@pytest.fixture(params=MODELS)
def setting(request) -> Setting:
    with torch_rng(Key(3)):
        module = MODELS[request.param]()
        batches = [(torch.randn(6, 4), torch.randn(6, 3)) for _ in range(4)]
    module[0].eval() if isinstance(module, nn.Sequential) else module.eval()  # flags that are not all alike
    loss_fn = module_loss(module, squared_error)
    train = partial(train_step, loss_fn=loss_fn, optimizer=adam(weight_decay=0.01), lr=0.05, clip_grad=0.5)
    state = init_state(module, adam(), seed=1)
    for batch in batches[:2]:  # optimizer state and buffers that are not zero
        state, _ = train(state, batch)
    return Setting(module, state, batches[2:], loss_fn, train)


def fingerprint(tensors: dict[str, Tensor]) -> dict[str, tuple]:
    return {
        name: (id(tensor), tensor.data_ptr(), tensor._version, tensor.requires_grad, tensor.grad, leaf_digest(tensor))
        for name, tensor in tensors.items()
    }


def everything(setting: Setting) -> dict[str, Any]:
    """All that a call can reach: the state, the batches, the module and the global generators."""
    module, state = setting.module, setting.state
    return {
        "state": fingerprint(state_leaves(state)),
        "digest": state_digest(state),
        "batches": fingerprint({f"{i} {j}": t for i, batch in enumerate(setting.batches) for j, t in enumerate(batch)}),
        "module": fingerprint({**dict(module.named_parameters()), **dict(module.named_buffers())}),
        "flags": [submodule.training for submodule in module.modules()],
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": repr(np.random.get_state()),  # noqa: NPY002
        "python": random.getstate(),
        "grad mode": torch.is_grad_enabled(),
    }


def result_bytes(result: Any) -> Any:
    if isinstance(result, TrainState):
        return state_digest(result)
    if isinstance(result, Tensor):
        return leaf_digest(result)
    if isinstance(result, dict):
        return {name: result_bytes(value) for name, value in result.items()}
    if isinstance(result, list | tuple):
        return [result_bytes(value) for value in result]
    return result


def assert_pure(setting: Setting, call: Callable[[], Any]) -> Any:
    before = everything(setting)
    first = call()
    kept = result_bytes(first)
    assert everything(setting) == before
    torch.rand(5)  # the global generators are no input, so they may move between the calls
    np.random.rand(5)  # noqa: NPY002
    random.random()
    between = everything(setting)
    second = call()
    assert everything(setting) == between
    assert result_bytes(second) == kept
    assert result_bytes(first) == kept  # the second call has not reached what the first one returned
    return first


@pytest.mark.parametrize("non_finite", ["raise", "defer"])
@pytest.mark.parametrize("backend", ["autograd", "func"])
def test_train_step_is_pure(setting, backend, non_finite):
    step = partial(setting.train, backend=backend, non_finite=non_finite)
    new, _ = assert_pure(setting, lambda: step(setting.state, setting.batches[0]))
    old = setting.state
    assert new.step == old.step + 1
    assert any(leaf_digest(new.params[name]) != leaf_digest(old.params[name]) for name in old.params)
    frozen = {name for name, p in setting.module.named_parameters() if not p.requires_grad}
    addresses = [
        {
            tensor.data_ptr()
            for name, tensor in state_leaves(state).items()
            if name.removeprefix("buffers/") not in frozen
        }
        for state in (new, old)
    ]
    assert not addresses[0] & addresses[1]  # a donated later step must not reach the old state; frozen ones stay


@pytest.mark.parametrize("optimizer", [sgd(), sgd(momentum=0.9, nesterov=True), radam()])
def test_train_step_is_pure_with_each_optimizer(setting, optimizer):
    state = setting.state.replace(opt_state=optimizer.init(setting.state.params), step=0)
    step = partial(setting.train, optimizer=optimizer)
    for batch in setting.batches:
        setting = setting._replace(state=state)
        state, _ = assert_pure(setting, lambda state=state, batch=batch: step(state, batch))


def test_eval_step_is_pure(setting):
    metrics = assert_pure(setting, lambda: eval_step(setting.state, setting.batches[0], loss_fn=setting.loss_fn))
    assert sorted(metrics) == ["loss", "size"]


@pytest.mark.parametrize("backend", ["autograd", "func"])
def test_value_and_grad_is_pure(setting, backend):
    state, batch = setting.state, setting.batches[0]
    assert_pure(
        setting,
        lambda: value_and_grad(setting.loss_fn, state.params, state.buffers, batch, key=Key(4), backend=backend),
    )


@pytest.mark.parametrize("backend", ["autograd", "func"])
def test_epoch_fn_is_pure(setting, backend):
    step = partial(setting.train, backend=backend)
    state, _ = assert_pure(setting, lambda: epoch_fn(setting.state, setting.batches, step=step))
    assert (state.epoch, state.step) == (1, setting.state.step + len(setting.batches))


def test_eval_epoch_fn_is_pure(setting):
    step = partial(eval_step, loss_fn=setting.loss_fn)
    assert_pure(setting, lambda: eval_epoch_fn(setting.state, setting.batches, step=step))


def test_the_loop_is_pure(setting):
    epoch_batches = [*setting.batches, *setting.batches]

    def run() -> list:
        return list(
            train_and_validate(
                setting.state,
                train=lambda key, epoch, start: epoch_batches[start:],
                valid=lambda key, epoch, start: setting.batches,
                step=setting.train,
                eval_step=partial(eval_step, loss_fn=setting.loss_fn),
                learning_rate=0.1,
                max_epochs=2,
                clock=lambda: 0.0,
            )
        )

    assert len(assert_pure(setting, run)) == 2


def test_init_state_is_pure(setting):
    assert_pure(setting, lambda: init_state(setting.module, adam(), seed=1))


def test_a_loop_of_donated_steps_leaves_all_but_its_first_state_alone(setting):
    copied = setting._replace(state=init_state(setting.module, adam(), seed=1))
    before = everything(setting)
    state: TrainState = copied.state
    metrics: Metrics = {}
    for batch in setting.batches:
        state, metrics = setting.train(state, batch, donate=True)
    assert metrics
    assert everything(setting) == before


def test_calls_may_alternate_between_states_and_modes(setting):
    # A module that is shared behind the loss function would mix them up.
    first, other = setting.state, init_state(setting.module, adam(), seed=9)
    batch = setting.batches[0]
    evaluate = partial(eval_step, loss_fn=setting.loss_fn)
    alone = [result_bytes(call(s, batch)) for s in (first, other) for call in (setting.train, evaluate)]
    mixed = [result_bytes(call(s, batch)) for call in (evaluate, setting.train) for s in (other, first)]
    assert alone == [mixed[3], mixed[1], mixed[2], mixed[0]]
