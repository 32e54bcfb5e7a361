"""Claims about checkpoints of composed runs: nested states, their names, and exact resume at every batch."""

from functools import partial

import pytest
import torch
from torch import nn

from dwiml_func.checkpoint import CheckpointError, read, restore, save
from dwiml_func.checkpoint.background import copy_to_host
from dwiml_func.checkpoint.digest import state_digest, state_leaves
from dwiml_func.core.loop import train_and_validate
from dwiml_func.core.loss import module_loss
from dwiml_func.core.rng import Key, fold_in, numpy_rng, torch_rng
from dwiml_func.core.run_epoch import Interrupted
from dwiml_func.core.state import TrainState, init_state
from dwiml_func.core.step import eval_step, train_step
from dwiml_func.optim import (
    accumulate,
    adam,
    adamw,
    by_name,
    chain,
    clip_by_global_norm,
    ema,
    per_step,
    reduce_on_plateau,
    skip_not_finite,
    warm_up,
)

OPTIMIZER = chain(
    accumulate(3),
    clip_by_global_norm(0.5),
    ema(by_name(adamw, {"*.bias": {"weight_decay": 0}, "stem.*": {"lr": 0.1}}, weight_decay=0.1), 0.9),
)
RATE = reduce_on_plateau(per_step(warm_up(lambda step: 0.05, length=17)), factor=0.5, patience=0, threshold=0.999)
NUM_BATCHES, NUM_EPOCHS = 10, 3


class Model(nn.Module):
    """One head for even batches, another for odd ones."""

    def __init__(self) -> None:
        super().__init__()
        with torch_rng(Key(1)):
            self.stem, self.even, self.odd = nn.Linear(3, 5), nn.Linear(5, 1), nn.Linear(5, 1)
            self.dropout = nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.odd if len(x) % 2 else self.even)(self.dropout(self.stem(x).tanh()))


LOSS = module_loss(Model(), lambda model, x: ((model(x) - x.sum(1, keepdim=True)).square().mean(), len(x)))


def batches(key: Key, epoch: int, start_batch: int) -> list[torch.Tensor]:
    return [
        torch.from_numpy(numpy_rng(fold_in(key, epoch, number)).normal(size=(3 + number, 3))).float()
        for number in range(start_batch, NUM_BATCHES)
    ]


def epochs(state: TrainState, optimizer=OPTIMIZER, interrupt=None):
    return train_and_validate(
        state,
        train=batches,
        valid=lambda key, epoch, start: batches(Key(9), 0, start)[:2],
        step=partial(train_step, loss_fn=LOSS, optimizer=optimizer, donate=True),
        eval_step=partial(eval_step, loss_fn=LOSS, optimizer=optimizer),
        learning_rate=RATE,
        max_epochs=NUM_EPOCHS,
        interrupt=interrupt,
    )


def first_state(optimizer=OPTIMIZER) -> TrainState:
    return init_state(Model(), optimizer, seed=0)


@pytest.fixture(scope="module")
def uninterrupted() -> str:
    ends = [state for state, _ in epochs(first_state())]
    assert [state.plateau.num_reductions for state in ends] == [0, 1, 2]
    return state_digest(ends[-1])


@pytest.mark.parametrize("kill_at", range(1, NUM_EPOCHS * NUM_BATCHES + 1))
def test_a_run_that_was_killed_at_any_batch_ends_in_the_uninterrupted_digest(kill_at, uninterrupted, tmp_path):
    num_batches = 0

    def kill() -> bool:
        nonlocal num_batches
        num_batches += 1
        validated = 2 * ((kill_at - 1) // NUM_BATCHES)  # validation batches are counted too
        return num_batches >= kill_at + validated

    with pytest.raises(Interrupted) as caught:
        list(epochs(first_state(), interrupt=kill))
    assert caught.value.state.step == kill_at
    save(tmp_path, caught.value.state)
    restored = restore(tmp_path, like=first_state()).state
    assert state_digest(restored) == state_digest(read(tmp_path).state) == state_digest(caught.value.state)
    assert state_digest([state for state, _ in epochs(restored)][-1]) == uninterrupted


def test_leaves_are_named_by_their_path():
    state = [state for state, _ in epochs(first_state())][-1]
    names = [name for name in state_leaves(state) if name.endswith(("even.bias", "/weight", "/missed"))]
    assert names == [
        *("params/even.bias", "opt_state/0/mean/even.bias", "opt_state/0/weight", "opt_state/0/unused/even.bias"),
        *("opt_state/optimizer/average/even.bias", "opt_state/optimizer/optimizer/0/exp_avg/even.bias"),
        "opt_state/optimizer/optimizer/0/exp_avg_sq/even.bias",
    ]


def test_names_that_would_collide_are_refused():
    state, one = first_state(adam()), torch.ones(1)
    with pytest.raises(ValueError, match="Expected names without a slash"):
        state_leaves(state.replace(opt_state={"a/b": {"c": one}}))
    with pytest.raises(ValueError, match="several opt_state/a/b/c"):
        state_leaves(state.replace(opt_state={"a": {"b": {"c": one}, "b/c": one}}))


def test_parameters_with_a_slash_in_their_name_are_restored(tmp_path):
    model = nn.Module()
    model.register_parameter("a/b", nn.Parameter(torch.ones(2)))
    state = init_state(model, ema(adam()), seed=0)
    save(tmp_path, state)
    assert read(tmp_path).state.opt_state.keys() == {"average", "optimizer"}
    assert set(read(tmp_path).state.opt_state["optimizer"]["exp_avg"]) == {"a/b"}
    assert state_digest(restore(tmp_path, state).state) == state_digest(state)


def test_counts_that_have_started_fit_a_first_state_and_other_links_do_not(tmp_path):
    state = first_state(adam())
    for batch in batches(Key(0), 0, 7):
        state, _ = train_step(state, batch, loss_fn=LOSS, optimizer=adam(), lr=0.1)
    assert "missed" in state.opt_state
    save(tmp_path / "a", state)
    assert state_digest(restore(tmp_path / "a", first_state(adam())).state) == state_digest(state)
    save(tmp_path / "b", first_state(adam()))
    restored = restore(tmp_path / "b", state.replace(batch=0)).state
    assert state_digest(restored) == state_digest(first_state(adam()))
    with pytest.raises(CheckpointError, match="does not fit"):
        restore(tmp_path / "a", first_state(chain(skip_not_finite(2), adam())))


def test_a_copy_on_the_host_shares_no_memory_and_reuses_that_of_an_earlier_one():
    state = [state for state, _ in epochs(first_state())][-1]
    copied = copy_to_host(state)
    assert state_digest(copied) == state_digest(state)
    memory = [{leaf.data_ptr() for leaf in state_leaves(each).values()} for each in (state, copied)]
    assert not memory[0] & memory[1]
    again = copy_to_host(state, reuse=copied)
    assert {leaf.data_ptr() for leaf in state_leaves(again).values()} == memory[1]
