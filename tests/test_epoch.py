"""Claims about `dwiml_func.core.loop`: a fold that can be cut anywhere, and that closes no epoch that went wrong."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from dwiml_func.checkpoint.digest import state_digest
from dwiml_func.core.epoch import epoch_fn, eval_epoch_fn
from dwiml_func.core.loss import LossOut, module_loss
from dwiml_func.core.metrics import read_means
from dwiml_func.core.non_finite import NON_FINITE, NonFiniteError
from dwiml_func.core.rng import Key, torch_rng
from dwiml_func.core.state import TrainState, init_state
from dwiml_func.core.step import eval_step, train_step
from dwiml_func.optim.optimizers import adam, sgd
from dwiml_func.types import Sum

SIZES = [7, 1, 4, 7, 2]


def model() -> nn.Module:
    with torch_rng(Key(11)):
        return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Dropout(0.3), nn.Linear(4, 1))


def squares(model: nn.Module, x: Tensor):
    values = model(x).square().mean(dim=1)
    return values.mean(), len(x), {"size": model(x).abs().mean()}


@pytest.fixture
def state() -> TrainState:
    return init_state(model(), adam(), seed=5)


@pytest.fixture
def batches() -> list[Tensor]:
    with torch_rng(Key(12)):
        return [torch.randn(size, 3) for size in SIZES]


STEP = partial(train_step, loss_fn=module_loss(model(), squares), optimizer=adam(), lr=0.01)
EVALUATE = partial(eval_step, loss_fn=module_loss(model(), squares))


class Folding:
    """A step that takes all batches at once too."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def __call__(self, state, batch, **options):
        return STEP(state, batch, **options)

    def fold(self, state, batches, *, lr=0.01):
        self.lengths.append(len(batches))
        for batch in batches:
            state, _ = STEP(state, batch, lr=lr)
        return state


def test_a_step_with_a_fold_takes_all_batches_at_once_unless_each_is_looked_at(state, batches):
    step = Folding()
    expected, _ = epoch_fn(state, batches, step=partial(STEP, lr=0.3))
    for own, alike in ((partial(step, lr=0.3), expected), (step, epoch_fn(state, batches, step=STEP)[0])):
        assert state_digest(epoch_fn(state, batches, step=own)[0]) == state_digest(alike)
    assert step.lengths == [5, 5]
    epoch_fn(state, batches, step=step, on_batch=lambda *_: None)
    epoch_fn(state, batches, step=lambda state, batch: step(state, batch))
    assert step.lengths == [5, 5]


def test_an_epoch_is_its_steps_one_after_another(state, batches):
    expected, seen = state, []
    for batch in batches:
        expected, metrics = STEP(expected, batch)
        seen.append((state_digest(expected), metrics))

    calls = []
    closed, sums = epoch_fn(
        state, batches, step=STEP, on_batch=lambda state, metrics: calls.append((state_digest(state), metrics))
    )
    assert calls == seen
    assert sums == expected.sums
    assert state_digest(closed) == state_digest(expected.replace(epoch=1, batch=0, sums={}))
    assert (closed.epoch, closed.batch, closed.step, closed.sums) == (1, 0, 5, {})


def test_means_over_unequal_batches_are_weighted(state, batches):
    losses = []
    _, sums = epoch_fn(state, batches, step=STEP, on_batch=lambda _, metrics: losses.append(metrics["loss"].total))
    means = read_means(sums)
    assert means["loss"] == pytest.approx(math.fsum(losses) / sum(SIZES), rel=1e-14)
    assert sums["loss"].weight == sums["size"].weight == sum(SIZES)
    assert sums["grad_norm"].weight == sums["unclipped_grad_norm"].weight == len(SIZES)


@pytest.mark.parametrize("cut", range(1, len(SIZES) + 1))
def test_an_epoch_cut_after_any_batch_ends_as_the_whole_one(state, batches, cut):
    # The last cut is after the last batch: nothing is left to train on, and the epoch only closes.
    captured: list[TrainState] = []
    whole, sums = epoch_fn(state, batches, step=STEP, on_batch=lambda state, _: captured.append(state))
    assert captured[cut - 1].batch == cut
    resumed, resumed_sums = epoch_fn(captured[cut - 1], batches[cut:], step=STEP)
    assert state_digest(resumed) == state_digest(whole)
    assert resumed_sums == sums


def test_batches_are_taken_one_at_a_time_when_they_are_needed(state, batches):
    order = []

    def stream():
        for index, batch in enumerate(batches):
            order.append(f"batch {index}")
            yield batch

    epoch_fn(state, stream(), step=STEP, on_batch=lambda state, _: order.append(f"done {state.batch}"))
    assert order == [text for index in range(5) for text in (f"batch {index}", f"done {index + 1}")]


def test_an_epoch_without_a_batch_is_refused(state):
    with pytest.raises(ValueError, match=r"Epoch 4 has no batch\. Expected at least one"):
        epoch_fn(state.replace(epoch=3), [], step=STEP)


# Not finite


def bad_where_nan(params, buffers, batch, *, key, train):
    return LossOut((params["weight"] * batch).square().sum(), 2, buffers, {})


def bad_setting() -> tuple[TrainState, partial]:
    state = init_state(nn.Linear(1, 1, bias=False), sgd(), seed=0)
    return state, partial(train_step, loss_fn=bad_where_nan, optimizer=sgd(), lr=0.1)


GOOD, BAD = torch.tensor(1.0), torch.tensor(float("nan"))


def test_a_bad_batch_ends_the_epoch_at_once_where_it_is_looked_at():
    state, step = bad_setting()
    seen = []
    with pytest.raises(NonFiniteError, match=r"The loss is nan in epoch 3, batch 2 \(step 22\)"):
        epoch_fn(
            state.replace(epoch=2, step=20),
            [GOOD, BAD, GOOD],
            step=partial(step, non_finite="raise"),
            on_batch=lambda state, _: seen.append(state.batch),
        )
    assert seen == [1]


@pytest.mark.parametrize(
    ("batches", "first"), [([GOOD, BAD, GOOD, BAD], 1), ([GOOD, GOOD, BAD], 2), ([BAD], 0), ([BAD, BAD], 0)]
)
@pytest.mark.parametrize("cut", range(4))
def test_a_deferred_check_names_the_first_bad_step_also_in_a_resumed_epoch(batches, first, cut):
    state, step = bad_setting()
    step = partial(step, non_finite="defer")
    state = state.replace(epoch=2, step=20)
    for batch in batches[:cut]:
        state, _ = step(state, batch)
    # As a checkpoint keeps the sums: plain numbers.
    state = state.replace(sums={name: Sum(float(total), float(weight)) for name, (total, weight) in state.sums.items()})
    with pytest.raises(NonFiniteError, match=rf"not finite in epoch 3, batch {first + 1} \(step {21 + first}\)"):
        epoch_fn(state, batches[cut:], step=step)


def test_a_deferred_check_leaves_nothing_behind_in_a_good_epoch():
    state, step = bad_setting()
    raised, expected = epoch_fn(state, [GOOD] * 3, step=partial(step, non_finite="raise"))
    closed, sums = epoch_fn(state, [GOOD] * 3, step=partial(step, non_finite="defer"))
    assert NON_FINITE not in sums
    assert sums == expected
    assert state_digest(closed) == state_digest(raised)


# Evaluation


def test_an_evaluation_is_weighted_over_unequal_batches(state, batches):
    losses = [EVALUATE(state, batch)["loss"].total for batch in batches]
    sums = eval_epoch_fn(state, iter(batches), step=EVALUATE)
    assert read_means(sums)["loss"] == pytest.approx(math.fsum(losses) / sum(SIZES), rel=1e-14)
    everything = EVALUATE(state, torch.cat(batches))  # one batch of all rows: the same mean
    assert read_means(sums)["loss"] == pytest.approx(read_means(everything)["loss"], rel=1e-5)


def test_an_evaluation_tells_its_batches_apart(state):
    def random_loss(params, buffers, batch, *, key, train):
        with torch_rng(key):
            return LossOut(torch.rand(()), 1, buffers, {})

    seen = []

    def step(state: TrainState, batch: object):
        metrics = eval_step(state, batch, loss_fn=random_loss)
        seen.append((state.batch, metrics["loss"].total))
        return metrics

    eval_epoch_fn(state, [0, 0, 0], step=step)
    eval_epoch_fn(state.replace(epoch=1), [0, 0, 0], step=step)
    assert [batch for batch, _ in seen] == [0, 1, 2, 0, 1, 2]
    assert len({value for _, value in seen}) == 6


def test_an_evaluation_of_nothing_is_empty(state):
    assert eval_epoch_fn(state, [], step=EVALUATE) == {}
