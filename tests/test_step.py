"""Claims about `dwiml_func.core.step`: a plain torch loop's bits, safe donation, nothing that is not finite."""

import copy
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from dwiml_func.checkpoint.digest import state_digest, state_leaves
from dwiml_func.compiled.step import jit_step
from dwiml_func.core.loss import LossOut, module_loss
from dwiml_func.core.non_finite import NON_FINITE, NonFiniteError, skip_metrics
from dwiml_func.core.rng import Key, Stream, fold_in, torch_rng
from dwiml_func.core.state import TrainState, check_can_donate, init_state
from dwiml_func.core.step import eval_step, train_step
from dwiml_func.optim.optimizers import adam, adamw, radam, sgd
from dwiml_func.types import Optimizer, Sum


@dataclass
class Batch:
    x: Tensor
    y: Tensor
    ids: object = (4, 8)


def mlp(dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch_rng(Key(11)):
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)


def noisy_mlp() -> nn.Module:
    with torch_rng(Key(11)):
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))


def make_batches(count: int, dtype: torch.dtype = torch.float32) -> list[Batch]:
    with torch_rng(Key(12)):
        return [Batch(torch.randn(5, 6).to(dtype), torch.randn(5, 3).to(dtype)) for _ in range(count)]


def squared_error(model, batch):
    return (model(batch.x) - batch.y).square().mean(), len(batch.x)


def rate(step: int, changing: bool) -> float:
    return 0.01 / (1 + step // 10) if changing else 0.01


PAIRS = {
    "sgd": (sgd(), torch.optim.SGD, {}),
    "sgd decay": (sgd(weight_decay=0.1), torch.optim.SGD, {"weight_decay": 0.1}),
    "momentum": (sgd(momentum=0.9), torch.optim.SGD, {"momentum": 0.9}),
    "momentum decay": (sgd(momentum=0.9, weight_decay=0.1), torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
    "nesterov": (sgd(momentum=0.9, nesterov=True), torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "adam": (adam(), torch.optim.Adam, {}),
    "adam decay": (adam(weight_decay=0.1), torch.optim.Adam, {"weight_decay": 0.1}),
    "adamw": (adamw(), torch.optim.AdamW, {}),
    "adamw no decay": (adamw(weight_decay=0.0), torch.optim.AdamW, {"weight_decay": 0.0}),
    "radam": (radam(), torch.optim.RAdam, {}),
    "radam decay": (radam(weight_decay=0.1), torch.optim.RAdam, {"weight_decay": 0.1}),
}


@pytest.mark.parametrize(
    ("clip_grad", "changing", "dtype"),
    [
        (None, False, torch.float64),
        (None, True, torch.float32),
        (0.3, False, torch.float32),
        (0.3, True, torch.float64),
    ],
)
@pytest.mark.parametrize("name", PAIRS)
def test_50_steps_have_the_bits_of_a_plain_loop(name, clip_grad, changing, dtype):
    optimizer, theirs, options = PAIRS[name]
    model, batches = mlp(dtype), make_batches(50, dtype)
    loss_fn = module_loss(model, squared_error)
    start = init_state(model, optimizer, seed=0)
    reference = theirs(model.parameters(), lr=0.01, **options)
    losses, norms = [], []
    for step, batch in enumerate(batches):
        reference.param_groups[0]["lr"] = rate(step, changing)
        reference.zero_grad()
        loss, _ = squared_error(model, batch)
        loss.backward()
        if clip_grad is not None:
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), clip_grad)))
        reference.step()
        losses.append(loss.item())

    for donate in (False, True):
        state = start.replace(
            params={n: p.clone() for n, p in start.params.items()}, opt_state=optimizer.init(start.params)
        )
        for step, batch in enumerate(batches):
            state, metrics = train_step(
                state,
                batch,
                loss_fn=loss_fn,
                optimizer=optimizer,
                lr=rate(step, changing),
                clip_grad=clip_grad,
                donate=donate,
            )
            assert metrics["loss"] == Sum(losses[step] * 5, 5.0)
            if clip_grad is not None:
                assert metrics["unclipped_grad_norm"] == Sum(norms[step], 1.0)
        assert state.step == 50
        for parameter_name, parameter in model.named_parameters():
            assert torch.equal(state.params[parameter_name], parameter)
            for kind, tensors in state.opt_state.items():
                assert torch.equal(tensors[parameter_name], reference.state[parameter][kind])
    assert clip_grad is None or max(norms) > clip_grad  # otherwise nothing was clipped


def test_a_model_with_dropout_and_batch_normalisation_has_the_bits_of_a_plain_loop():
    model, batches = noisy_mlp(), make_batches(20)
    state = init_state(model, adam(), seed=3)
    loss_fn = module_loss(model, squared_error)
    reference = torch.optim.Adam(model.parameters(), lr=0.01)
    for index, batch in enumerate(batches):
        with torch_rng(fold_in(Key(3), Stream.TRAIN_STEP, 0, index)):
            loss, _ = squared_error(model, batch)
        reference.zero_grad()
        loss.backward()
        reference.step()
        state, _ = train_step(state, batch, loss_fn=loss_fn, optimizer=adam(), lr=0.01)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert torch.equal({**state.params, **state.buffers}[name], tensor)
    assert state.buffers["1.num_batches_tracked"] == 20


@pytest.mark.parametrize("make_model", [mlp, noisy_mlp])
def test_the_engines_take_close_steps(make_model):
    model = make_model()
    loss_fn = module_loss(model, squared_error)
    states = []
    for backend in ("autograd", "func"):
        state = init_state(model, sgd(), seed=0)
        for batch in make_batches(10):
            state, metrics = train_step(
                state, batch, loss_fn=loss_fn, optimizer=sgd(), lr=0.1, clip_grad=1.0, backend=backend
            )
            assert metrics["loss"].weight == 5
        states.append(state)
    for first, second in zip(state_leaves(states[0]).values(), state_leaves(states[1]).values(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


@pytest.fixture
def run() -> tuple[TrainState, partial]:
    model = noisy_mlp()
    step = partial(train_step, loss_fn=module_loss(model, squared_error), optimizer=adam(), lr=0.01)
    return init_state(model, adam(), seed=0), step


def test_counters_and_sums_move_and_the_rest_stays(run):
    state, step = run
    first, metrics = step(state.replace(epoch=2, batch=4, step=9), make_batches(1)[0])
    assert (first.epoch, first.batch, first.step, first.key, first.best) == (2, 5, 10, state.key, state.best)
    assert first.sums == metrics
    second, more = step(first, make_batches(2)[1])
    for name, (total, weight) in second.sums.items():
        assert (total, weight) == (metrics[name].total + more[name].total, metrics[name].weight + more[name].weight)
    assert sorted(metrics) == ["grad_norm", "loss", "unclipped_grad_norm"]


def test_further_means_and_both_norms_are_reported():
    def loss_fn(params, buffers, batch, *, key, train):
        return LossOut((params["w"] * batch).sum(), 7, buffers, {"size": params["w"].sum()})

    state = init_state(nn.Linear(2, 1, bias=False), sgd(), seed=0)
    state = state.replace(params={"w": torch.tensor([1.0, 2.0])})
    state, metrics = train_step(
        state, torch.tensor([3.0, 4.0]), loss_fn=loss_fn, optimizer=sgd(), lr=0.5, clip_grad=1.0
    )
    assert metrics["loss"] == Sum(77.0, 7.0)
    assert metrics["size"] == Sum(21.0, 7.0)
    assert metrics["unclipped_grad_norm"] == Sum(5.0, 1.0)
    assert metrics["grad_norm"].total == pytest.approx(1.0, rel=1e-6)
    torch.testing.assert_close(state.params["w"], torch.tensor([1 - 0.3, 2 - 0.4]), rtol=1e-6, atol=0)


def test_draws_belong_to_the_epoch_and_the_batch_and_to_nothing_else(run):
    state, step = run
    batch = make_batches(1)[0]

    def loss(**position: int) -> float:
        return step(state.replace(**position), batch)[1]["loss"].total

    assert loss(epoch=1, batch=2, step=5) == loss(epoch=1, batch=2, step=90)
    assert len({loss(epoch=epoch, batch=index) for epoch in range(3) for index in range(3)}) == 9
    assert step(state.replace(key=Key(1)), batch)[1]["loss"].total != loss()


def test_training_and_validation_draw_from_streams_of_their_own():
    def loss_fn(params, buffers, batch, *, key, train):
        return LossOut(params["weight"].sum() * 0 + torch.tensor(float(key.path[0])), 1, buffers, {})

    state = init_state(nn.Linear(1, 1, bias=False), sgd(), seed=0)
    assert train_step(state, None, loss_fn=loss_fn, optimizer=sgd(), lr=0.1)[1]["loss"].total == Stream.TRAIN_STEP
    assert eval_step(state, None, loss_fn=loss_fn)["loss"].total == Stream.VALID_STEP


def test_a_limit_for_the_gradient_is_above_zero(run):
    state, step = run
    with pytest.raises(ValueError, match=r"clipping norm above 0.*Received: -1"):
        step(state, make_batches(1)[0], clip_grad=-1.0)


# Evaluation


def test_evaluation_is_that_of_the_module_in_evaluation_mode(run):
    state, step = run
    for batch in make_batches(3):
        state, _ = step(state, batch)
    model = noisy_mlp().eval()
    model.load_state_dict({**state.params, **state.buffers})
    batch = make_batches(4)[3]
    metrics = eval_step(state, batch, loss_fn=module_loss(noisy_mlp(), squared_error))
    with torch.no_grad():
        expected, _ = squared_error(model, batch)
    assert metrics == {"loss": Sum(expected.item() * 5, 5.0)}


def test_evaluation_builds_no_graph_and_may_be_not_finite():
    def loss_fn(params, buffers, batch, *, key, train):
        assert not train
        assert not torch.is_grad_enabled()
        return LossOut(params["weight"].sum() * batch, 1, buffers, {})

    state = init_state(nn.Linear(1, 1, bias=False), sgd(), seed=0)
    total = eval_step(state, torch.tensor(float("nan")), loss_fn=loss_fn)["loss"].total
    assert total != total


@pytest.mark.parametrize("name", ["loss", "grad_norm", "unclipped_grad_norm", NON_FINITE])
def test_a_further_mean_cannot_have_a_name_that_the_step_uses(name):
    def loss_fn(params, buffers, batch, *, key, train):
        return LossOut(params["weight"].square().sum(), 3, buffers, {name: torch.ones(())})

    with pytest.raises(ValueError, match=f"`aux` uses the reserved metric name '{name}'"):
        train_step(small_state(), GOOD, loss_fn=loss_fn, optimizer=adam(), lr=0.1)


# Donation


def test_a_donated_state_says_so_and_names_the_step(run):
    state, step = run
    state, _ = step(state, make_batches(1)[0])
    shared = state.replace(epoch=5)
    new, _ = step(state, make_batches(1)[0], donate=True)
    uses = [
        lambda state: step(state, make_batches(1)[0]),
        lambda state: step(state, make_batches(1)[0], donate=True),
        lambda state: eval_step(state, make_batches(1)[0], loss_fn=module_loss(noisy_mlp(), squared_error)),
        state_digest,
    ]
    direct = [
        lambda state: state.params["0.weight"],
        lambda state: dict(state.params),
        lambda state: list(state.buffers),
        lambda state: len(state.opt_state),
        lambda state: state.opt_state.get("exp_avg"),
        lambda state: state.params.items(),
        lambda state: "0.weight" in state.params,
    ]
    for old, ways in ((state, uses + direct), (shared, uses)):
        for use in ways:
            with pytest.raises(RuntimeError, match=r"donated to the update after step 1,.*donate=False"):
                use(old)
    assert (state.step, new.step) == (1, 2)
    assert state_digest(new)  # the new state is whole


@pytest.mark.parametrize("overlap", ["one tensor", "views", "a buffer", "none"])
def test_a_state_whose_tensors_overlap_is_not_donated(run, overlap):
    state, step = run
    memory, params, batch = torch.zeros(100), dict(state.params), make_batches(1)[0]
    params["0.bias"], params["1.weight"] = memory[:8], memory[8:16]  # neighbours
    state = state.replace(params=params)
    if overlap == "one tensor":
        params["1.bias"] = params["1.weight"]
    elif overlap == "views":
        params["4.weight"] = memory[15:39].view(3, 8)
    elif overlap == "a buffer":
        state = state.replace(buffers=state.buffers | {"1.running_mean": memory[:8]})
    options = {name: step.keywords[name] for name in ("loss_fn", "optimizer")}
    compiled = jit_step(**options, donate=True)
    for donating in (partial(step, donate=True), partial(compiled, lr=0.1)):
        if overlap == "none":
            donating(copy.deepcopy(state), batch)
            check_can_donate(init_state(noisy_mlp().to("meta"), adam(), seed=0))  # no addresses
            check_can_donate(state.replace(params={name: torch.ones(3, 0) for name in "ab"}, opt_state={}))  # the same
            break
        with pytest.raises(ValueError, match=r"memory of their own.*Received: \['\S+'\] and \['\S+'\] overlap\."):
            donating(state, batch)
    assert step(state, batch)[0].step == 1
    if overlap == "views":
        assert jit_step(**options, backend="eager")(state, batch, lr=0.01)[0].step == 1


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (lambda p: p[:, :5], r"Received: 0\.weight of torch\.float32 \(8, 5\) in place of torch\.float32 \(8, 6\)"),
        (lambda p: p.double(), r"Received: 0\.weight of torch\.float64 \(8, 6\) in place of torch\.float32 \(8, 6\)"),
        (lambda p: p.long(), "Expected parameters that can be trained. Received: 0.weight of integers"),
    ],
)
def test_a_tensor_that_does_not_fit_the_model_is_named(params, message):
    state = init_state(noisy_mlp(), sgd(), seed=0)
    state = state.replace(params={**state.params, "0.weight": params(state.params["0.weight"])})
    with pytest.raises(ValueError, match=message):
        train_step(state, make_batches(1)[0], loss_fn=module_loss(noisy_mlp(), squared_error), optimizer=sgd(), lr=0.1)


@pytest.mark.parametrize("defer", [False, True])
def test_donation_gives_the_same_bits(run, defer):
    start, step = run
    step = partial(step, non_finite="defer" if defer else "raise", clip_grad=0.5)
    kept = start
    donated = init_state(noisy_mlp(), adam(), seed=0)
    for batch in make_batches(10):
        kept, _ = step(kept, batch)
        donated, _ = step(donated, batch, donate=True)
    assert state_digest(kept) == state_digest(donated)
    assert start.step == 0  # and without donation the first state is still there
    assert state_digest(start) == state_digest(init_state(noisy_mlp(), adam(), seed=0))


def test_an_optimizer_that_skips_an_update_may_be_donated_to():
    inner, loss_fn = adam(), module_loss(noisy_mlp(), squared_error)

    def update(grads, opt_state, params, *, lr, step, donate=False):
        if step % 2:
            return params, opt_state
        return inner.update(grads, opt_state, params, lr=lr, step=step, donate=donate)

    digests = []
    for donate in (False, True):
        state = init_state(noisy_mlp(), inner, seed=0)
        for batch in make_batches(4):
            skipping = Optimizer(inner.init, update)
            state, _ = train_step(state, batch, loss_fn=loss_fn, optimizer=skipping, lr=0.1, donate=donate)
        digests.append(state_digest(state))
    assert digests[0] == digests[1]


def test_donation_never_reaches_the_module(run):
    model = noisy_mlp()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = init_state(model, adam(), seed=0)
    loss_fn = module_loss(model, squared_error)
    for batch in make_batches(3):
        state, _ = train_step(state, batch, loss_fn=loss_fn, optimizer=adam(), lr=0.1, donate=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# Not finite


def bad_loss(kind: str):
    """A loss that is good where `batch.x` is 1 and bad in one way where it is not."""

    def loss_fn(params, buffers, batch, *, key, train):
        w = params["weight"]
        zero = w.sum() - w.sum().detach()  # with gradient 1
        bad = {
            "loss nan": w.sum() * float("nan"),
            "loss inf": w.sum() + float("inf"),
            "loss -inf": w.sum() - float("inf"),
            "gradient inf": zero.sqrt(),
            "gradient nan": zero.sqrt() * 0,
        }
        loss = w.square().sum() if batch.x == 1 else bad[kind]
        return LossOut(loss, 3, {"b": buffers["b"] + 1}, {})

    return loss_fn


KINDS = ["loss nan", "loss inf", "loss -inf", "gradient inf", "gradient nan"]
GOOD, BAD = (Batch(torch.tensor(value), torch.zeros(()), ids=torch.tensor([4, 8])) for value in (1.0, 0.0))


def small_state(optimizer=None) -> TrainState:
    state = init_state(nn.Linear(2, 1, bias=False), optimizer or adam(), seed=0)
    return state.replace(buffers={"b": torch.zeros(())}, params={"weight": torch.tensor([[0.5, -0.25]])})


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_is_refused_by_epoch_batch_step_and_ids(kind, donate):
    step = partial(train_step, loss_fn=bad_loss(kind), optimizer=adam(), lr=0.1, donate=donate)
    state, _ = step(small_state(), GOOD)
    state = state.replace(epoch=2, batch=5, step=17)
    before = state_digest(state)
    what, value = ("loss", kind.split()[1]) if kind.startswith("loss") else ("gradient norm", "(nan|inf)")
    with pytest.raises(NonFiniteError, match=rf"The {what} is {value} in epoch 3, batch 6 \(step 18\), ids 4, 8\."):
        step(state, BAD)
    assert state_digest(state) == before
    assert step(state, GOOD)[0].step == 18  # the state can be trained further, also one that would have been donated


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("clip_grad", [None, 0.5])
@pytest.mark.parametrize("optimizer", [sgd(), sgd(momentum=0.9), adam(), adamw(), radam()])
@pytest.mark.parametrize("kind", KINDS)
def test_a_deferred_check_leaves_the_values_as_they_were(kind, optimizer, clip_grad, donate):
    step = partial(train_step, loss_fn=bad_loss(kind), optimizer=optimizer, lr=0.1, clip_grad=clip_grad)
    step = partial(step, non_finite="defer", donate=donate)
    state, _ = step(small_state(optimizer), GOOD)
    assert state.sums[NON_FINITE] == Sum(0.0, 0.0)
    before = {name: leaf.clone() for name, leaf in state_leaves(state).items()}
    # Once one step was bad, the rest of the epoch takes none.
    for batch, note in ((BAD, Sum(1.0, 1.0)), (GOOD, Sum(0.0, 0.0)), (BAD, Sum(0.0, 0.0))):
        state, metrics = step(state, batch)
        assert metrics[NON_FINITE] == note
        assert state.sums[NON_FINITE] == Sum(1.0, 1.0)
        for name, leaf in state_leaves(state).items():
            assert torch.equal(leaf, before[name])
    assert (state.step, state.batch) == (4, 4)


def test_a_deferred_check_changes_no_bit_of_a_good_run(run):
    state, step = run
    raising = deferring = state
    for batch in make_batches(5):
        raising, _ = step(raising, batch, non_finite="raise")
        deferring, metrics = step(deferring, batch, non_finite="defer")
        assert metrics[NON_FINITE] == Sum(0.0, 0.0)
    for name, leaf in state_leaves(raising).items():
        assert torch.equal(leaf, state_leaves(deferring)[name])


@pytest.mark.parametrize("optimizer", [sgd(momentum=0.9), adam(), adamw(), radam()])
def test_on_an_accelerator_no_step_waits_for_a_value(optimizer):
    # Meta tensors have no value: reading one raises an error.
    model = noisy_mlp().to("meta")
    step = partial(train_step, loss_fn=module_loss(model, squared_error), optimizer=optimizer, lr=0.1, clip_grad=1.0)
    state = init_state(model, optimizer, seed=0)
    batch = Batch(torch.zeros(5, 6, device="meta"), torch.zeros(5, 3, device="meta"))
    for donate in (False, True):
        state, metrics = step(state, batch, donate=donate)
        assert NON_FINITE in metrics
    assert all(isinstance(value, Tensor) for name, value in metrics.items() for value in metrics[name][:1])
    with pytest.raises(RuntimeError, match="meta"):
        step(state, batch, non_finite="raise")


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        (None, r"\(step 1\)\. "),
        (torch.tensor([3]), r"\(step 1\), ids 3\. "),
        (range(8), r", ids 0, 1, 2, 3, 4, 5, 6, 7\. "),
        (torch.arange(9), r", ids 0, 1, 2, 3, 4, 5, 6, 7, \.\.\. \(9 in all\)\. "),
    ],
)
def test_many_ids_are_shortened_and_none_are_needed(ids, text):
    batch = Batch(BAD.x, BAD.y, ids=ids)
    with pytest.raises(NonFiniteError, match=text):
        train_step(small_state(), batch, loss_fn=bad_loss("loss nan"), optimizer=adam(), lr=0.1)


@pytest.mark.parametrize(("weight", "text"), [(3, "The step was not taken"), (0, "The batch has no points")])
def test_a_batch_without_points_is_said_to_have_none(weight, text):
    def loss_fn(params, buffers, batch, *, key, train):
        return LossOut(params["weight"].sum() * torch.nan, weight, buffers, {})

    with pytest.raises(NonFiniteError, match=rf"\(step 1\)\. {text}\. Check these inputs"):
        train_step(small_state(), None, loss_fn=loss_fn, optimizer=adam(), lr=0.1)


def test_the_sums_of_a_skipped_batch_are_zero_and_float64_where_they_cannot_be_read():
    for is_bad in (True, False):
        loss = Sum(torch.tensor(torch.nan if is_bad else 6.0), torch.tensor(2.0))
        sums = skip_metrics(torch.tensor(is_bad), {"loss": loss})
        assert {name: tuple(map(float, own)) for name, own in sums.items()} == {
            "loss": (0.0, 0.0) if is_bad else (6.0, 2.0),
            "skipped": (float(is_bad), 1.0),
        }
        assert {part.dtype for part in sums["skipped"] if isinstance(part, Tensor)} == {torch.float64}
        kept = Sum(0.0, 0.0) if is_bad else Sum(6.0, 2.0)
        assert skip_metrics(is_bad, {"loss": Sum(6.0, 2.0)}) == {"loss": kept, "skipped": Sum(float(is_bad), 1.0)}


@pytest.mark.parametrize("name", ["loss", "grad_norm", "unclipped_grad_norm"])
def test_a_further_mean_cannot_hide_the_steps_own(name):
    def loss_fn(params, buffers, batch, *, key, train):
        loss = (params["w"] * batch).sum()
        return LossOut(loss, 1, buffers, {name: loss.detach()})

    optimizer = sgd()
    params = {"w": torch.ones(2)}
    state = TrainState(params=params, buffers={}, opt_state=optimizer.init(params), key=Key(0))
    with pytest.raises(ValueError, match=name):
        train_step(state, torch.ones(2), loss_fn=loss_fn, optimizer=optimizer, lr=0.1)
