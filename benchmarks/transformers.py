"""A training batch of a transformer on flat rows, beside torch's own layers with masks on padded input.

Two such: as one writes them with tensors, and as dwi_ml writes them (`transformer_models.py`,
`transformer_sublayers.py`): lists of streamlines that are padded and masked in loops, and layers whose queries, keys
and values are three products.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

import torch
from ensemble import measure
from timing import interleaved, medians_of
from torch import Tensor, nn
from verdicts import conclude

from dwiml_func import adam, ensemble_step, init_state, keep_freed_memory, module_loss, stack_states, train_step
from dwiml_func.data import StreamlineBatch
from dwiml_func.data.streamlines import input_offsets, offsets_of
from dwiml_func.models import Transformer, compute_batch_loss
from dwiml_func.models.transformers.tokens import sinusoidal_encoding

NUM_STREAMLINES, FEATURES, SIZE, HEADS = 100, 45, 128, 8
OURS, MASKED, LISTED = "flat rows", "nn.TransformerEncoder", "lists, as in dwi_ml"
MEMBERS, ONE, TOGETHER, LARGE = 4, "one after the other", "as an ensemble", "as one model on all rows"
SMALL = (40, 32)  # the longest line and d, for which the ensemble has a limit
LIMITS = {MASKED: {0.0: 1.5, 0.1: 1.5}, LISTED: {0.0: 2.2, 0.1: 4.0}}  # of each dropout; 0.1 is dwi_ml's default


def main() -> int:
    """Print the times and whether the limit holds. Exit code 1 when it does not."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1, help="torch.set_num_threads (default: 1)")
    parser.add_argument("--rounds", type=int, default=5, help="batches of each variant (default: 5)")
    parser.add_argument("--layers", type=int, default=6, help="layers of the encoder (default: 6)")
    parser.add_argument("--ensemble", action="store_true", help="small transformers in an ensemble, and nothing else")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.ensemble:
        keep_freed_memory()  # as the commands do
        return compare_ensembles(options.rounds)
    batch = make_batch()
    verdicts = []
    for rate in (0.0, 0.1):
        model = Transformer(
            FEATURES, model="tts", input_embedded_size=SIZE, nheads=HEADS, n_layers_e=options.layers, dropout_rate=rate
        )
        others = {
            MASKED: Masked(model, options.layers, rate),
            LISTED: Listed(model, options.layers, rate),
        }
        for other in others.values():
            if rate == 0.0:
                torch.testing.assert_close(other(batch), model(batch), atol=1e-4, rtol=1e-3)
        runs = {name: partial(train, one, batch) for name, one in {OURS: model, **others}.items()}
        medians = medians_of(interleaved(runs, options.rounds, warm_up=1))
        print(f"dropout {rate:g}: " + ", ".join(f"{name} {1e3 * seconds:.0f} ms" for name, seconds in medians.items()))
        for name, limits in LIMITS.items():
            ratio = medians[name] / medians[OURS]
            what = f"{ratio:.2f} times faster than {name} with dropout {rate:g}, at least {limits[rate]:g} required"
            verdicts.append((ratio >= limits[rate], what))
    print(
        f"{NUM_STREAMLINES} streamlines, {batch.num_points} points, {options.layers} layers, {options.threads} threads"
    )
    return conclude(verdicts)


def compare_ensembles(rounds: int) -> int:
    """Steps of 4 models of 2 layers and 4 heads: one after the other, as an ensemble, and of one on 4 times the batch.

    The last is what no ensemble can be faster than: the same rows, and each operation called once. Times are those of
    the processor, as in `ensemble.py`.
    """
    verdicts = []
    for num, shortest, longest, size in ((10, 20, 40, 32), (10, 40, 100, 32), (20, 40, 100, 32), (20, 40, 100, 64)):
        batch, large = (make_batch(num, shortest, longest, repeats) for repeats in (1, MEMBERS))
        models = [
            Transformer(FEATURES, model="tts", input_embedded_size=size, nheads=4, n_layers_e=2, dropout_rate=0.0)
            for _ in range(MEMBERS)
        ]
        states = [init_state(model, adam(), seed=0) for model in models]
        static = {"loss_fn": module_loss(models[0], compute_batch_loss), "optimizer": adam(), "lr": 1e-3}
        runs = {
            ONE: lambda batch=batch, states=states, static=static: [train_step(s, batch, **static) for s in states],
            TOGETHER: partial(ensemble_step, stack_states(states), batch, **static),
            LARGE: partial(train_step, states[0], large, **static),
        }
        medians = medians_of(measure(runs, rounds))
        print(
            f"{num} streamlines of {shortest} to {longest} points, d {size}: {1e3 * medians[ONE]:.0f} ms {ONE};", end=""
        )
        print("".join(f" {medians[ONE] / medians[name]:.2f} times faster {name}" for name in (TOGETHER, LARGE)))
        ratio = medians[ONE] / medians[TOGETHER]
        if (longest, size) == SMALL:
            verdicts.append((ratio >= 1.5, f"{ratio:.2f} times faster {TOGETHER}, at least 1.5 required"))
    return conclude(verdicts)


def make_batch(num: int = NUM_STREAMLINES, shortest: int = 40, longest: int = 200, repeats: int = 1) -> StreamlineBatch:
    """Streamlines of 40 to 200 points."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(shortest, longest + 1, (num,), generator=generator).repeat(repeats)
    offsets = offsets_of(lengths)
    num_rows = int(input_offsets(offsets)[-1])
    return StreamlineBatch(
        points=torch.randn(int(offsets[-1]), 3, generator=generator).cumsum(0),
        offsets=offsets,
        subject=torch.zeros(len(lengths), dtype=torch.int64),
        ids=torch.arange(len(lengths)),
        inputs=torch.randn(num_rows, FEATURES, generator=generator),
    )


def train(model: nn.Module, batch: StreamlineBatch) -> None:
    """Loss and gradients."""
    model.zero_grad()
    loss, *_ = compute_batch_loss(model, batch)  # pyright: ignore[reportArgumentType]
    loss.backward()


class Masked(nn.Module):
    """The same model by torch's layers: padded input, causal and padding masks."""

    def __init__(self, model: Transformer, num_layers: int, rate: float) -> None:
        super().__init__()
        self.embedding, self.direction_getter, self.rate = model.input_embedding_layer, model.direction_getter, rate
        layer = nn.TransformerEncoderLayer(SIZE, HEADS, SIZE // 2, rate, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
        self.encoder.load_state_dict(model.modified_torch_transformer.state_dict())

    def forward(self, batch: StreamlineBatch) -> Tensor:
        """The direction getter's outputs at the rows of the batch's inputs."""
        lengths = batch.input_offsets.diff()
        x = nn.utils.rnn.pad_sequence(list(batch.inputs.split(lengths.tolist())), batch_first=True)
        steps = torch.arange(x.shape[1])
        x = self.embedding(x) + sinusoidal_encoding(steps, SIZE)
        x = nn.functional.dropout(x, self.rate, self.training)
        padding = steps >= lengths[:, None]
        y = self.encoder(x, mask=steps > steps[:, None], src_key_padding_mask=padding)
        return self.direction_getter(y[~padding])


class Listed(Masked):
    """The same model as dwi_ml writes it."""

    def __init__(self, model: Transformer, num_layers: int, rate: float) -> None:
        super().__init__(model, num_layers, rate)
        for module in self.encoder.modules():
            if isinstance(module, nn.MultiheadAttention):
                assert module.in_proj_weight is not None
                parts = module.in_proj_weight.detach().chunk(3)
                module.register_parameter("in_proj_weight", None)
                module._qkv_same_embed_dim = False
                names = "q_proj_weight", "k_proj_weight", "v_proj_weight"
                for name, part in zip(names, parts, strict=True):
                    setattr(module, name, nn.Parameter(part.clone()))

    def forward(self, batch: StreamlineBatch) -> Tensor:
        """The direction getter's outputs at the rows of the batch's inputs."""
        inputs = list(batch.inputs.split(batch.input_offsets.diff().tolist()))
        lengths = [len(one) for one in inputs]
        longest = max(lengths)
        future = nn.Transformer.generate_square_subsequent_mask(longest) < 0
        padding = torch.zeros(len(inputs), longest, dtype=torch.bool)
        for number, length in enumerate(lengths):
            padding[number, length:] = True
        x = torch.stack([nn.functional.pad(one, (0, 0, 0, longest - len(one))) for one in inputs])
        x = self.embedding(x) + sinusoidal_encoding(torch.arange(longest), SIZE)
        x = nn.functional.dropout(x, self.rate, self.training)
        y = self.encoder(x, mask=future, src_key_padding_mask=padding)
        return self.direction_getter(torch.cat([y[number, :length] for number, length in enumerate(lengths)]))


if __name__ == "__main__":
    sys.exit(main())
