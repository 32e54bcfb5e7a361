"""Transformers: torch's own layers are the truth; flat rows, caches and transforms change nothing."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dwiml_func import init_state, jit_step, module_loss, sgd, train_step
from dwiml_func.core.gradients import value_and_grad
from dwiml_func.core.precision import autocast_forward
from dwiml_func.core.rng import Key
from dwiml_func.data.batch import StreamlineBatch
from dwiml_func.data.streamlines import input_offsets, offsets_of
from dwiml_func.ensemble import ensemble_step, member, stack_states
from dwiml_func.models.learn2track import compute_batch_loss
from dwiml_func.models.transformers.attention import _attend, _Pad, sequences_of
from dwiml_func.models.transformers.causal import causal_weights
from dwiml_func.models.transformers.transformer import Transformer

F = 6
LENGTHS = [9, 2, 14, 5, 13]
KINDS = ("tts", "ttst", "tto")
by_kind = pytest.mark.parametrize("kind", KINDS)
by_norm = pytest.mark.parametrize("norm_first", [False, True])


def _model(kind: Any, *, seed: int = 0, **options: Any) -> Transformer:
    options = {"input_embedded_size": 8, "nheads": 2, "n_layers_e": 2, "dropout_rate": 0.0, **options}
    if kind == "ttst":
        options = {"target_embedded_size": 4, **options}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Transformer(F, model=kind, **options)
    for parameter in model.parameters():  # biases and norms at their initial values would hide mistakes
        parameter.data += 0.1 * torch.sin(torch.arange(parameter.numel()).reshape(parameter.shape))
    return model


def _batch(
    lengths: list[int] = LENGTHS, *, add_eos: bool = False, dtype: torch.dtype = torch.float32
) -> StreamlineBatch:
    generator = torch.Generator().manual_seed(len(lengths))
    offsets = offsets_of(torch.tensor(lengths))
    num_rows = int(offsets[-1]) if add_eos else int(input_offsets(offsets)[-1])
    return StreamlineBatch(
        points=torch.rand(int(offsets[-1]), 3, generator=generator, dtype=dtype) * 4,
        offsets=offsets,
        subject=torch.zeros(len(lengths), dtype=torch.int64),
        ids=torch.arange(len(lengths)),
        inputs=torch.randn(num_rows, F, generator=generator, dtype=dtype),
    )


def _torch_layer(kind: Any, model: Transformer, layers: Any, size: int, activation: str, norm_first: bool) -> Any:
    """A layer of torch's own, with the options of a model's layers."""
    heads, hidden, dropout = layers[0].self_attn.num_heads, layers[0].linear1.out_features, model.dropout_rate
    options: dict[str, Any] = {"batch_first": True, "norm_first": norm_first, "dtype": torch.float64}
    return kind(size, heads, hidden, dropout, activation, **options)


def _with_parameters(theirs: Any, layers: Any) -> Any:
    for own, ours in zip(theirs.layers, layers, strict=True):
        own.load_state_dict(ours.state_dict())
    return theirs


def _torch_encoder(model: Transformer, size: int, activation: str, norm_first: bool) -> torch.nn.TransformerEncoder:
    """Torch's own encoder, with the model's parameters."""
    layers: Any = model.modified_torch_transformer
    layers = getattr(layers, "encoder", layers).layers
    layer = _torch_layer(torch.nn.TransformerEncoderLayer, model, layers, size, activation, norm_first)
    return _with_parameters(torch.nn.TransformerEncoder(layer, len(layers), enable_nested_tensor=False), layers)


def _torch_decoder(model: Transformer, size: int, activation: str, norm_first: bool) -> torch.nn.TransformerDecoder:
    layers: Any = model.modified_torch_transformer
    layers = layers.decoder.layers
    layer = _torch_layer(torch.nn.TransformerDecoderLayer, model, layers, size, activation, norm_first)
    return _with_parameters(torch.nn.TransformerDecoder(layer, len(layers)), layers)


def _encoding(length: int, size: int) -> Tensor:
    """Vaswani et al., section 3.5, written out."""
    table = torch.zeros(length, size, dtype=torch.float64)
    for position in range(length):
        for pair in range(size // 2):
            angle = torch.tensor(position / 10000 ** (2 * pair / size), dtype=torch.float64)
            table[position, 2 * pair], table[position, 2 * pair + 1] = angle.sin(), angle.cos()
    return table


def _by_torch(model: Transformer, batch: StreamlineBatch, activation: str, norm_first: bool) -> Tensor:
    """The model's outputs by torch's layers, on padded input with causal and padding masks."""
    offsets = batch.input_offsets.tolist()
    rows = [batch.inputs[a:b] for a, b in pairwise(offsets)]
    x = torch.nn.utils.rnn.pad_sequence([model.input_embedding_layer(r) for r in rows], batch_first=True)
    longest = x.shape[1]
    target = None
    if model.kind != "tts":
        tokens = []
        for a, b, length in zip(batch.offsets[:-1], batch.offsets[1:], [len(r) for r in rows], strict=True):
            dirs = batch.points[a:b].diff(dim=0)[: length - 1]
            shifted = torch.cat([dirs.new_zeros(1, 4), torch.cat([dirs, dirs.new_zeros(len(dirs), 1)], dim=1)])
            shifted[0, 3] = 1
            tokens.append(model.embedding_layer_t(shifted))
        target = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
    if model.kind == "ttst":
        x, target = torch.cat([x, target], dim=2) if target is not None else x, None
    size = x.shape[2]
    causal = torch.ones(longest, longest, dtype=torch.bool).triu(1)
    padding = torch.arange(longest) >= torch.tensor([[len(r)] for r in rows])
    drop = torch.nn.Dropout(model.dropout_rate)
    x = drop(x + _encoding(longest, size))
    encoder = _torch_encoder(model, size, activation, norm_first)
    y = encoder(x, mask=causal, src_key_padding_mask=padding)
    if target is not None:
        decoder = _torch_decoder(model, size, activation, norm_first)
        y = decoder(
            drop(target + _encoding(longest, size)), y, tgt_mask=causal, memory_mask=causal,
            tgt_key_padding_mask=padding, memory_key_padding_mask=padding,
        )  # fmt: skip
    return model.direction_getter(y[~padding])


@by_kind
@by_norm
@pytest.mark.parametrize(
    ("activation", "nheads", "lengths"),
    [("relu", 2, LENGTHS), ("gelu", 2, LENGTHS), ("gelu", 1, [2]), ("relu", 4, [17, 2, 16, 33])],
)
def test_outputs_and_gradients_are_those_of_torchs_own_layers_with_masks(
    kind: str, norm_first: bool, activation: str, nheads: int, lengths: list[int]
) -> None:
    model = _model(kind, norm_first=norm_first, activation=activation, nheads=nheads).double()
    batch = _batch(lengths, dtype=torch.float64)
    outputs, expected = model(batch), _by_torch(model, batch, activation, norm_first)
    torch.testing.assert_close(outputs, expected, atol=1e-10, rtol=0)
    leaf = model.get_parameter("input_embedding_layer.linear.weight")
    (ours,) = torch.autograd.grad(outputs.square().sum(), [leaf])
    (theirs,) = torch.autograd.grad(expected.square().sum(), [leaf])
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)


def _scaled(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """In place of dropout: what it acts on becomes larger."""
    return x * (1 + p) if training else x


def _scaled_attention(query: Tensor, key: Tensor, value: Tensor, mask: Any, dropout_p: float, _: bool) -> Tensor:
    weights = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5 + mask).softmax(dim=-1)
    return _scaled(weights, dropout_p) @ value


class _ScaledWeights:
    """In place of dropout on the weights of attention."""

    share = 1 / 1.25

    def __init__(self, *_: object) -> None:
        pass

    def bits(self, _: object) -> None:
        """None are drawn."""

    def kept(self, *_: object) -> None:
        """Of all weights none is dropped."""


@by_kind
@by_norm
def test_dropout_acts_where_it_does_in_torchs_own_layers_and_on_what_is_read(
    kind: str, norm_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("layers", "transformer"):
        monkeypatch.setattr(f"dwiml_func.models.transformers.{module}.dropout", _scaled)
    monkeypatch.setattr("dwiml_func.models.transformers.causal.Dropout", _ScaledWeights)
    monkeypatch.setattr("torch.nn.functional.dropout", _scaled)
    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", _scaled_attention)
    model = _model(kind, norm_first=norm_first, dropout_rate=0.25).double().train()
    batch = _batch(dtype=torch.float64)
    expected = _by_torch(model, batch, "relu", norm_first)
    torch.testing.assert_close(model(batch), expected, atol=1e-10, rtol=0)
    assert not torch.allclose(model.eval()(batch), expected, atol=1e-3)


@by_kind
def test_matrices_begin_as_xaviers_or_torchs_and_sizes_have_their_defaults(kind: Any) -> None:
    options: dict[str, Any] = {"target_embedded_size": 8} if kind == "ttst" else {}
    model = Transformer(F, model=kind, input_embedded_size=32, nheads=2, n_layers_e=3, **options)
    layers: Any = model.modified_torch_transformer
    size = layers.encoder.layers[0].norm1.weight.shape[0] if kind == "tto" else layers.layers[0].norm1.weight.shape[0]
    assert kind != "tto" or (len(layers.encoder.layers), len(layers.decoder.layers)) == (3, 3)
    for name, parameter in layers.named_parameters():
        if name.endswith("in_proj_weight"):  # the three of an attention, each by itself
            limits = [(part, (6 / (2 * size)) ** 0.5) for part in parameter.chunk(3)]
        elif name.endswith("weight") and parameter.ndim == 2:
            of_linear = 1 / parameter.shape[1] ** 0.5
            limits = [(parameter, (6 / sum(parameter.shape)) ** 0.5 if kind == "tto" else of_linear)]
            assert "linear1" not in name or parameter.shape == (size // 2, size)
        else:
            assert "attn" not in name or not parameter.any()  # biases of attention
            continue
        for part, limit in limits:
            assert 0.9 * limit < part.abs().max().item() <= limit, name


@by_kind
@pytest.mark.parametrize("sos_token_type", ["as_label", "repulsion724"])
def test_bf16_rounds_neither_positions_nor_classes_of_tokens(kind: str, sos_token_type: str) -> None:
    if kind == "tts" and sos_token_type != "as_label":
        return
    model, batch = _model(kind, n_layers_e=1, sos_token_type=sos_token_type).eval(), _batch([5, 400])
    outputs = autocast_forward(model, torch.bfloat16)(batch)
    torch.testing.assert_close(outputs, model(batch), rtol=0, atol=0.02)
    low = replace(batch, points=batch.points.bfloat16(), inputs=batch.inputs.bfloat16())
    expected = model(replace(batch, points=low.points.float(), inputs=low.inputs.float()))
    outputs = model.bfloat16()(low)  # parameters too
    torch.testing.assert_close(outputs.float(), expected, rtol=0, atol=0.06)


@by_kind
def test_the_plain_operations_of_transforms_give_the_same(kind: str) -> None:
    model, batch = _model(kind).double(), _batch(dtype=torch.float64)
    params = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def outputs(params: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, params, (batch,))

    mapped = torch.func.vmap(outputs)({name: torch.stack([p, 2 * p]) for name, p in params.items()})
    torch.testing.assert_close(mapped[0], model(batch), atol=1e-12, rtol=0)


@by_kind
def test_first_and_second_gradients_are_those_of_finite_differences(kind: str) -> None:
    model, batch = _model(kind, n_layers_e=1, activation="gelu").double(), _batch([4, 3], dtype=torch.float64)
    name = next(n for n, _ in model.named_parameters() if n.endswith("self_attn.in_proj_weight"))
    others = {n: p.detach() for n, p in model.named_parameters()}
    direction = torch.sin(torch.arange(others[name].numel(), dtype=torch.float64)).reshape(others[name].shape)

    def along(step: Tensor) -> Tensor:
        params = others | {name: others[name] + step * direction}
        return torch.func.functional_call(model, params, (batch,)).square().sum()

    first, second = torch.func.grad(along), torch.func.grad(torch.func.grad(along))
    zero, h = torch.zeros((), dtype=torch.float64), 1e-4
    values = [along(zero + k * h) for k in (-2, -1, 0, 1, 2)]
    expected = (values[0] - 8 * values[1] + 8 * values[3] - values[4]) / (12 * h)
    torch.testing.assert_close(first(zero), expected, rtol=1e-8, atol=1e-8)
    expected = (-values[0] + 16 * values[1] - 30 * values[2] + 16 * values[3] - values[4]) / (12 * h * h)
    torch.testing.assert_close(second(zero), expected, rtol=1e-5, atol=1e-5)


@by_kind
def test_a_prediction_depends_on_the_streamline_up_to_its_point_and_on_nothing_else(kind: str) -> None:
    model, batch = _model(kind).eval(), _batch([9])
    before = model(batch)
    for changed in range(8):
        inputs = batch.inputs.clone()
        inputs[changed] += 1
        same = (model(replace(batch, inputs=inputs)) == before).all(dim=1)
        assert same[:changed].all()
        assert not same[changed:].any()
    together = _batch([9, 4, 9])
    alone = StreamlineBatch(
        points=together.points[:9], offsets=together.offsets[:2], subject=together.subject[:1], ids=together.ids[:1],
        inputs=together.inputs[:8],
    )  # fmt: skip
    torch.testing.assert_close(model(alone), model(together)[:8])


@by_kind
@pytest.mark.parametrize("add_eos", [False, True])
@pytest.mark.parametrize("sos_token_type", ["as_label", "repulsion100"])
def test_one_point_at_a_time_gives_what_the_whole_streamline_gives(
    kind: str, add_eos: bool, sos_token_type: str
) -> None:
    if kind == "tts" and sos_token_type != "as_label":
        return
    model = _model(kind, sos_token_type=sos_token_type, dg_args={"add_eos": add_eos}).double().eval()
    if kind != "tts":
        model.embedding_layer_t.double()
    batch = _batch([140, 70, 3], add_eos=add_eos, dtype=torch.float64)  # more than two blocks, and one, and none full
    offsets = batch.input_offsets
    whole = model(batch)
    state, dirs = None, batch.points.diff(dim=0)
    with torch.no_grad():
        for step in range(int(offsets.diff().max())):
            rows = (offsets[:-1] + step).clamp(max=len(batch.inputs) - 1)  # rows past an end are not compared
            previous = dirs[(batch.offsets[:-1] + step - 1).clamp(min=0, max=len(dirs) - 1)]
            outputs, state = model.run_step(batch.inputs[rows], previous, state)
            for line in range(3):
                if step < offsets.diff()[line]:
                    expected = whole[offsets[line] + step]
                    torch.testing.assert_close(outputs[line], expected, atol=1e-10, rtol=0)


@by_kind
def test_a_state_of_tracking_is_not_written_and_a_row_of_count_zero_starts_again(kind: str) -> None:
    model = _model(kind).eval()
    inputs, dirs = torch.randn(70, 2, F), torch.randn(70, 2, 3)
    state = None
    with torch.no_grad():
        for step in range(66):
            _, state = model.run_step(inputs[step], dirs[step], state)
        assert state is not None
        kept = copy.deepcopy(state)
        first, after = model.run_step(inputs[66], dirs[66], state)
        torch.testing.assert_close(state, kept, rtol=0, atol=0)
        again, _ = model.run_step_in_place(inputs[66], dirs[66], state)
        assert torch.equal(first, again)
        restarted = after.forget(torch.tensor([False, True]))
        outputs, _ = model.run_step(inputs[67], dirs[67], restarted)
        fresh, _ = model.run_step(inputs[67], dirs[67], None)
        assert torch.equal(outputs[1], fresh[1])  # whatever stands beside it, and however long


@pytest.mark.compiles
def test_steps_ensembles_and_compiled_steps_train_alike() -> None:
    batch = _batch()
    models = [_model("ttst", seed=seed, n_layers_e=1) for seed in (1, 2)]
    loss_fn, optimizer = module_loss(models[0], compute_batch_loss), sgd()  # Adam: signs of rounded zeros
    states = [init_state(model, optimizer, seed=0) for model in models]
    alone = [train_step(state, batch, loss_fn=loss_fn, optimizer=optimizer, lr=0.01) for state in states]
    together, _ = ensemble_step(stack_states(states), batch, loss_fn=loss_fn, optimizer=optimizer, lr=0.01)
    for number, (state, _) in enumerate(alone):
        for name, value in member(together, number).params.items():
            torch.testing.assert_close(value, state.params[name], atol=1e-5, rtol=1e-4)
    step = jit_step(loss_fn=loss_fn, optimizer=optimizer, dynamic=True, backend="aot_eager")
    for lengths in (LENGTHS, [5, 30, 4], [12, 7, 6, 2]):
        state, batch = states[0], _batch(lengths)
        compiled, _ = step(state, batch, lr=0.01)
        eager, _ = train_step(state, batch, loss_fn=loss_fn, optimizer=optimizer, lr=0.01)
        for name, value in eager.params.items():
            torch.testing.assert_close(compiled.params[name], value, atol=1e-5, rtol=1e-4)
    assert step.eager_reason is None
    assert step.num_compilations <= 2


def test_dropout_comes_from_the_key() -> None:
    model, batch = _model("tto", dropout_rate=0.3), _batch()
    loss_fn = module_loss(model, compute_batch_loss)
    params = {name: p.detach() for name, p in model.named_parameters()}
    losses = [value_and_grad(loss_fn, params, {}, batch, key=Key(k))[0].loss for k in (1, 1, 2)]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]
    model.eval()
    assert torch.equal(model(batch), model(batch))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("tts", {"nheads": 3}, "nheads: expected heads that divide"),
        ("tts", {"input_embedded_size": 3}, "input_embedded_size: expected at least 4"),
        ("tts", {"n_layers_d": 2}, "n_layers_d: requires model tto"),
        ("tto", {"target_embedded_size": 8}, "target_embedded_size: requires model ttst"),
        ("tto", {"target_embedding_key": "no_embedding"}, "target_embedding_key: expected as many features"),
        ("ttst", {"sos_token_type": "ball"}, "sos_token_type: expected as_label or a sphere"),
        ("ttst", {"target_embedded_size": None}, "target_embedding_key: nn_embedding requires target_embedded_size"),
        ("tts", {"dropout_rate": 1.0}, "dropout_rate"),
        ("tts", {"max_len": 0}, "max_len"),
        ("ttt", {}, "model: expected one of"),
    ],
)
def test_options_that_make_no_model_are_refused(kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _model(kind, **options)


def test_streamlines_longer_than_max_len_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model("tts", max_len=12).eval()
    with pytest.raises(ValueError, match="at most 12 points, received one with 13"):
        model(_batch())
    with monkeypatch.context() as patch:  # a graph reads no lengths: they are seen before it
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert len(model.rows(_batch())[0]) == _batch().num_points
    state = None
    for _ in range(12):
        _, state = model.run_step(torch.zeros(2, F), torch.zeros(2, 0), state)
    assert state is not None
    for num_read in ([12, 12], [12, 3]):  # of one of the two lines
        with pytest.raises(ValueError, match="at most 12 points, received one with 13"):
            model.run_step(torch.zeros(2, F), torch.zeros(2, 0), state._replace(num_read=torch.tensor(num_read)))


def test_the_model_sees_the_noisy_points() -> None:
    model, batch = _model("ttst").eval(), _batch()
    noisy = batch.points + 0.5 * torch.randn_like(batch.points)
    outputs = model(replace(batch, noisy_points=noisy))
    assert torch.equal(outputs, model(replace(batch, points=noisy)))
    assert not torch.equal(outputs, model(batch))


def test_one_kernel_attends_but_not_with_dropout_nor_under_transforms_some_of_which_it_lacks() -> None:
    def with_outputs(rows: Tensor) -> tuple[Tensor, Tensor]:
        outputs = _attend(rows, key, value, 0.0)
        return outputs.sum(), outputs

    query, key, value = torch.randn(3, 2, 2, 40, 8).unbind()
    plain = causal_weights(query, key) @ value
    fused = scaled_dot_product_attention(query, key, value, is_causal=True)
    assert not torch.equal(fused, plain)
    assert torch.equal(_attend(query, key, value, 0.0), fused)
    assert torch.equal(torch.func.grad(with_outputs, has_aux=True)(query)[1], plain)
    assert not torch.allclose(_attend(query, key, value, 0.5), plain, atol=1e-2)


def test_rows_are_padded_and_unpadded_alike_under_transforms_as_on_a_gpu() -> None:
    """Forward, backward and along many members; a gradient of padding is none."""
    sequences = sequences_of(torch.tensor([0, 3, 4, 9]), 9)
    assert sequences.padding is not None
    flat = torch.randn(5, 9, 2, dtype=torch.float64)
    padded = torch.stack([sequences._pad(each) for each in flat])
    assert torch.equal(padded[:, sequences.places], flat)
    assert torch.equal(torch.vmap(sequences._pad)(flat), padded)
    assert torch.equal(torch.vmap(sequences._pad, in_dims=2)(flat.permute(1, 2, 0)), padded)
    noise = torch.randn_like(padded)
    assert torch.equal(torch.vmap(sequences._unpad)(noise), noise[:, sequences.places])
    gradient = torch.func.grad(lambda rows: (sequences._unpad(rows) ** 2).sum())
    expected = torch.zeros_like(padded)
    expected[:, sequences.places] = 2 * noise[:, sequences.places]
    assert torch.equal(torch.vmap(gradient)(noise), expected)
    assert torch.autograd.gradcheck(sequences._unpad, noise[0].requires_grad_())
    with pytest.raises(NotImplementedError, match="vmap over the offsets"):
        torch.vmap(lambda rows: _Pad.apply(flat[0], rows, sequences.places, sequences.padding))(
            sequences.rows.expand(2, -1)
        )
