"""Claims about steps with composed optimizers: nested states, weights, unused parameters, steps that are skipped."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves

from dwiml_func.compiled.step import jit_step
from dwiml_func.core.epoch import end_epoch, epoch_fn
from dwiml_func.core.loss import module_loss
from dwiml_func.core.metrics import read_means
from dwiml_func.core.non_finite import NonFiniteError
from dwiml_func.core.rng import Key, torch_rng
from dwiml_func.core.state import TrainState, check_can_donate, init_state
from dwiml_func.core.step import eval_step, train_step
from dwiml_func.core.weights import load_into
from dwiml_func.distributed.sharding import sharded_value_and_grad
from dwiml_func.ensemble.state import stack_states
from dwiml_func.ensemble.step import ensemble_step
from dwiml_func.optim import (
    Optimizer,
    accumulate,
    adam,
    adamw,
    by_name,
    chain,
    clip_by_global_norm,
    ema,
    lion,
    lookahead,
    muon,
    nadam,
    rmsprop,
    schedule_free_adamw,
    schedule_free_sgd,
    sgd,
    skip_not_finite,
)

COMPOSED = {
    "rmsprop": rmsprop(momentum=0.9),
    "nadam": nadam(),
    "lion": lion(),
    "muon": muon(others=adamw()),
    "schedule_free_sgd": schedule_free_sgd(),
    "schedule_free_adamw": schedule_free_adamw(),
    "lookahead": lookahead(sgd(), num_steps=4),
    "chain": chain(
        accumulate(2),
        skip_not_finite(3),
        clip_by_global_norm(0.5),
        ema(by_name(adamw, {"*.bias": {"weight_decay": 0, "lr": 0.5}}), 0.9),
    ),
}


class TwoHeads(nn.Module):
    """Batches of four rows use one head, other batches the other."""

    def __init__(self) -> None:
        super().__init__()
        with torch_rng(Key(5)):
            self.stem, self.four, self.other = nn.Linear(3, 4), nn.Linear(4, 1), nn.Linear(4, 1)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return (self.four if len(x) == 4 else self.other)(self.stem(x).tanh())


def squared(model: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    return (model(x) - x.sum(1, keepdim=True)).square().mean(), len(x)


def batch(number: int, size: int) -> Tensor:
    return torch.randn(size, 3, generator=torch.Generator().manual_seed(number), dtype=torch.float64)


LOSS = module_loss(TwoHeads(), squared)
SIZES = (4, 5, 5, 4, 4, 6)


def run(optimizer: Optimizer, sizes=SIZES, lr: float = 0.05, **options: Any) -> TrainState:
    state = init_state(TwoHeads(), optimizer, seed=0)
    for number, size in enumerate(sizes):
        state, _ = train_step(
            state, batch(number, size), loss_fn=LOSS, optimizer=optimizer, lr=lr * (1 + number), **options
        )
    return state


@pytest.mark.parametrize("clip_grad", [None, 0.1])
@pytest.mark.parametrize(
    ("optimizer", "make"),
    [
        (adam(weight_decay=0.1), partial(torch.optim.Adam, weight_decay=0.1)),
        (sgd(momentum=0.9, weight_decay=0.1), partial(torch.optim.SGD, momentum=0.9, weight_decay=0.1)),
        (rmsprop(weight_decay=0.1), partial(torch.optim.RMSprop, weight_decay=0.1)),
    ],
    ids=["adam", "sgd", "rmsprop"],
)
def test_parameters_that_a_batch_does_not_use_are_left_alone_as_torch_optim_leaves_them(optimizer, make, clip_grad):
    model = TwoHeads()
    expected = make(model.parameters(), lr=0.05)
    for number, size in enumerate(SIZES):
        expected.param_groups[0]["lr"] = 0.05 * (1 + number)
        expected.zero_grad()
        squared(model, batch(number, size))[0].backward()
        if clip_grad:
            nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
        expected.step()
    for donate in (False, True):
        state = run(optimizer, clip_grad=clip_grad, donate=donate)
        for name, parameter in model.named_parameters():
            assert torch.equal(state.params[name], parameter)


def test_shards_leave_alone_what_none_of_them_uses():
    step = partial(train_step, loss_fn=LOSS, optimizer=adam(), lr=0.1, gradient_fn=sharded_value_and_grad())
    start = init_state(TwoHeads(), adam(), seed=0)
    state, _ = step(start, [batch(0, 5), batch(1, 6), None])
    assert state.params["four.weight"] is start.params["four.weight"]
    assert not torch.equal(state.params["other.weight"], start.params["other.weight"])
    state, _ = step(start, [batch(0, 5), batch(1, 4)])
    assert not any(torch.equal(state.params[name], start.params[name]) for name in start.params)


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("name", COMPOSED)
def test_a_deferred_check_and_donation_change_no_bit(name, donate):
    expected, actual = run(COMPOSED[name]), run(COMPOSED[name], donate=donate, non_finite="defer")
    for one, other in zip(tree_leaves(dict(actual.opt_state)), tree_leaves(dict(expected.opt_state)), strict=True):
        assert torch.equal(one, other)
    for one in expected.params:
        assert torch.equal(actual.params[one], expected.params[one])
    for state in (actual, expected, run(COMPOSED[name], donate=donate)):
        check_can_donate(state)


@pytest.mark.parametrize("name", COMPOSED)
def test_a_donated_update_takes_no_memory_but_for_a_restart_and_for_a_first_micro_batch(name):
    def places(*trees: Any) -> dict[str, int]:
        return {keystr(path): leaf.data_ptr() for path, leaf in tree_flatten_with_path(trees)[0] if leaf.dim()}

    optimizer, params = COMPOSED[name], {"a.weight": torch.ones(3, 3), "a.bias": torch.ones(3)}
    opt_state, moved = optimizer.init(params), set()
    for step in range(6):
        old, grads = places(params, opt_state), {name: torch.full_like(p, 0.1) for name, p in params.items()}
        params, opt_state = optimizer.update(grads, opt_state, params, lr=0.1, step=step, donate=True)
        new = places(params, opt_state)
        moved |= {(step, "mean" if "mean" in leaf else leaf[:3]) for leaf in old if new[leaf] != old[leaf]}
    assert moved == {"lookahead": {(3, "[0]")}, "chain": {(step, "mean") for step in (0, 2, 4)}}.get(name, set())


def test_micro_batches_of_unequal_size_make_the_step_of_the_whole_batch():
    optimizer = chain(accumulate(3), adam())
    sizes = (5, 9, 2)
    state = run(optimizer, sizes, lr=0.1)
    whole = torch.cat([batch(number, size) for number, size in enumerate(sizes)])
    start = init_state(TwoHeads(), adam(), seed=0)
    expected, _ = train_step(start, whole, loss_fn=LOSS, optimizer=adam(), lr=0.1 * 3)
    torch.testing.assert_close(state.params, expected.params)


NAN = torch.full((5, 3), math.nan, dtype=torch.float64)
SKIPPING = chain(skip_not_finite(2), adam())


@pytest.mark.parametrize("donate", [False, True])
def test_a_step_that_is_not_finite_is_skipped_and_counted(donate):
    step = partial(train_step, loss_fn=LOSS, optimizer=SKIPPING, lr=0.1, donate=donate)
    first, last = batch(0, 5), batch(1, 5)
    state, sums = epoch_fn(init_state(TwoHeads(), SKIPPING, seed=0), [first, NAN, NAN, last], step=step)
    assert sums["skipped"] == (2.0, 4.0)
    assert sums["loss"].weight == 10
    assert all(math.isfinite(mean) for mean in read_means(sums).values())
    without, _ = epoch_fn(init_state(TwoHeads(), SKIPPING, seed=0), [first, last], step=step)
    for name in state.params:
        assert torch.equal(state.params[name], without.params[name])


def test_too_many_skipped_steps_in_a_row_end_the_epoch():
    step = partial(train_step, loss_fn=LOSS, optimizer=SKIPPING, lr=0.1)
    batches = [batch(0, 5), NAN, NAN, batch(1, 5), NAN, NAN, NAN, batch(2, 5)]
    with pytest.raises(NonFiniteError, match=r"too many steps in a row, up to epoch 1, batch 7 \(step 7\)"):
        epoch_fn(init_state(TwoHeads(), SKIPPING, seed=0), batches, step=step)
    state = init_state(TwoHeads(), SKIPPING, seed=0)
    for _ in range(2):  # as where no step reads the numbers
        state, _ = step(state, NAN)
    assert end_epoch(state)[1]["skipped"] == (2, 2)
    state, _ = step(state, NAN)
    with pytest.raises(NonFiniteError, match="too many steps in a row, up to epoch 1, batch 3"):
        end_epoch(state)


def test_a_loss_alone_that_is_not_finite_is_skipped_too():
    def infinite(model: nn.Module, x: Tensor) -> tuple[Tensor, int]:
        return model(x).square().mean() + math.inf, len(x)

    start = init_state(TwoHeads(), SKIPPING, seed=0)
    loss_fn = module_loss(TwoHeads(), infinite)
    state, sums = train_step(start, batch(0, 5), loss_fn=loss_fn, optimizer=SKIPPING, lr=0.1)
    assert sums["skipped"].total == 1
    assert all(torch.equal(state.params[name], start.params[name]) for name in start.params)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
@pytest.mark.parametrize("kind", ["eager", "compiled", "ensemble"])
def test_a_skipped_batch_changes_no_buffer(kind):
    def infinite_for_large(model: nn.Module, x: Tensor) -> tuple[Tensor, int]:
        return model(x).square().mean() + torch.where(x.max() > 99, math.inf, 0.0), len(x)

    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)).double()
    options: dict[str, Any] = {"loss_fn": module_loss(model, infinite_for_large), "optimizer": SKIPPING}
    state: Any = init_state(model, SKIPPING, seed=0)
    step: Any = {
        "eager": partial(train_step, **options),
        "compiled": jit_step(**options, backend="eager"),
        "ensemble": partial(ensemble_step, **options),
    }[kind]
    state = stack_states([state, state]) if kind == "ensemble" else state
    good, _ = step(state, batch(0, 5), lr=0.1)
    bad, _ = step(good, 100 * batch(1, 5).abs(), lr=0.1)
    assert not torch.equal(good.buffers["0.running_mean"], state.buffers["0.running_mean"])
    for name in ("params", "buffers"):
        assert all(torch.equal(getattr(bad, name)[n], tensor) for n, tensor in getattr(good, name).items())
    skipped, weight = bad.sums["skipped"]
    assert (torch.as_tensor(skipped).tolist(), torch.as_tensor(weight).tolist()) == (
        ([1.0, 1.0], [2.0, 2.0]) if kind == "ensemble" else (1.0, 2.0)
    )
    assert torch.as_tensor(bad.sums["loss"].weight).eq(5).all()


def test_an_optimizer_that_cannot_skip_is_refused_to():
    start = init_state(TwoHeads(), adam(), seed=0)
    with pytest.raises(ValueError, match="Expected an optimizer with skip_not_finite"):
        train_step(start, NAN, loss_fn=LOSS, optimizer=adam(), lr=0.1, non_finite="skip")
    start = init_state(TwoHeads(), SKIPPING, seed=0)
    with pytest.raises(NonFiniteError):
        train_step(start, NAN, loss_fn=LOSS, optimizer=SKIPPING, lr=0.1, non_finite="raise")


@pytest.mark.parametrize("name", ["chain", "schedule_free_adamw"])
def test_evaluation_and_weights_are_those_of_the_average(name):
    optimizer, model = COMPOSED[name], TwoHeads()
    state = run(optimizer)
    average = optimizer.eval_params(state.opt_state, state.params)  # type: ignore
    assert not torch.equal(average["stem.weight"], state.params["stem.weight"])
    expected = eval_step(state.replace(params=average), batch(0, 4), loss_fn=LOSS)
    assert eval_step(state, batch(0, 4), loss_fn=LOSS, optimizer=optimizer) == expected
    assert eval_step(state, batch(0, 4), loss_fn=LOSS) != expected
    load_into(model, state, optimizer=optimizer)
    assert torch.equal(model.stem.weight, average["stem.weight"])
    load_into(model, state)
    assert torch.equal(model.stem.weight, state.params["stem.weight"])
    with pytest.raises(ValueError, match="Received: both"):
        load_into(model, state, optimizer=optimizer, params=average)
