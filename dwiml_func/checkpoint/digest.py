"""What a state is made of, leaf by leaf, and the SHA-256 of it; by how much two tensors differ, down to the last bit.

Two states have the same digest exactly when every tensor has the same name, shape, dtype and bytes, and every number is
the same. The device does not count.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dwiml_func.core.early_stopping import Best
from dwiml_func.core.report import Validation
from dwiml_func.core.rng import Key
from dwiml_func.core.state import TrainState, check_not_donated
from dwiml_func.files.json import to_json_data
from dwiml_func.types import Plateau, Sum

__all__ = [
    "BitDifference",
    "bit_difference",
    "combine_digests",
    "is_starting_count",
    "leaf_differences",
    "leaf_digest",
    "numbers_to_fields",
    "state_digest",
    "state_from_leaves",
    "state_leaves",
    "state_numbers",
    "tensor_bytes",
]


class BitDifference(NamedTuple):
    """How two tensors differ.

    Args:
        num_values: values in each.
        num_different: pairs of values whose bits differ.
        largest: largest absolute difference; NaN where one of a pair is NaN or both are the same infinity.
        first: where the first pair that differs is.
        values: that pair, as text that gives the bits again.
        ulps: how many representable values lie between the pair, the further one included; for integers their distance.

    Example:
        >>> bit_difference(torch.ones(2), torch.ones(2)) is None
        True
    """

    num_values: int
    num_different: int
    largest: float
    first: tuple[int, ...]
    values: tuple[str, str]
    ulps: int


def bit_difference(a: Tensor, b: Tensor) -> BitDifference | None:
    """Compare two tensors bitwise: a NaN equals a bitwise identical one, and -0 does not equal 0.

    Args:
        a: any tensor.
        b: one of the same shape and dtype.

    Returns:
        How they differ; None where they do not.

    Raises:
        ValueError: shapes or dtypes differ.

    Example:
        >>> found = bit_difference(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0 + 2**-22]))
        >>> found.num_different, found.first, found.values, found.ulps
        (1, (1,), ('2.0', '2.0000002'), 1)
    """
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        raise ValueError(
            f"Expected two tensors of the same shape and dtype. "
            f"Received: {a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}"
        )
    if a.is_complex():
        a, b = torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj())
    bits = _bits(a), _bits(b)
    places = np.flatnonzero(bits[0] != bits[1])
    if not len(places):
        return None
    first = int(places[0])
    pairs = [tensor.detach().cpu().reshape(-1)[torch.from_numpy(places)] for tensor in (a, b)]
    with np.errstate(invalid="ignore"):
        distances = np.abs(pairs[0].double().numpy() - pairs[1].double().numpy())
    return BitDifference(
        num_values=a.numel(),
        num_different=len(places),
        largest=float(distances.max()),
        first=tuple(int(i) for i in np.unravel_index(first, a.shape)) if a.ndim else (),
        values=(_text(pairs[0][0]), _text(pairs[1][0])),
        ulps=abs(_rank(bits[0][first], a) - _rank(bits[1][first], b)),
    )


def _bits(tensor: Tensor) -> NDArray[np.signedinteger]:
    array = np.ascontiguousarray(tensor_bytes(tensor)).ravel()
    return array.view(f"i{array.itemsize}")


def _rank(bits: np.signedinteger, tensor: Tensor) -> int:
    """Floats in order as integers: 0 and -0 are 0, the next ones 1 and -1."""
    number, half = int(bits), 1 << (8 * bits.itemsize - 1)
    return -(number + half) if tensor.is_floating_point() and number < 0 else number


def _text(value: Tensor) -> str:
    try:
        return str(value.numpy()[()])  # the shortest text of its own dtype
    except TypeError:
        return repr(value.item())


def state_leaves(state: TrainState) -> dict[str, Tensor]:
    """Every tensor of a state under one flat name.

    Args:
        state: the state.

    Returns:
        Tensors by name: `params/NAME`, `buffers/NAME`, and the path to each of the optimizer state's, such as
        `opt_state/exp_avg/NAME` or `opt_state/optimizer/average/NAME`.

    Raises:
        RuntimeError: the state was donated to a step.
        ValueError: a part of the optimizer state has a slash in its name, so that two tensors could get the same name.

    Example:
        >>> from dwiml_func import adam, init_state
        >>> sorted(state_leaves(init_state(torch.nn.Linear(1, 1, bias=False), adam(), seed=0)))
        ['opt_state/exp_avg/weight', 'opt_state/exp_avg_sq/weight', 'params/weight']
    """
    check_not_donated(state)
    leaves = {f"params/{name}": tensor for name, tensor in state.params.items()}
    leaves |= {f"buffers/{name}": tensor for name, tensor in state.buffers.items()}
    for name, leaf in _paths(state.opt_state, "opt_state"):
        if name in leaves:
            raise ValueError(f"Expected one tensor of each name in an optimizer state. Received: several {name}")
        leaves[name] = leaf
    return leaves


def _paths(tree: Mapping[str, Any], path: str) -> Iterator[tuple[str, Tensor]]:
    for name, part in tree.items():
        if not isinstance(part, Mapping):
            yield f"{path}/{name}", part
        elif "/" in name:
            raise ValueError(f"Expected names without a slash for the parts of an optimizer state. Received: {name!r}")
        else:
            yield from _paths(part, f"{path}/{name}")


def state_numbers(state: TrainState) -> dict[str, Any]:
    """Everything in a state that is no tensor, as JSON takes it. Metric sums are read from their device.

    Args:
        state: the state.

    Returns:
        Nested dicts and lists of numbers.

    Example:
        >>> from dwiml_func import init_state, sgd
        >>> state_numbers(init_state(torch.nn.Linear(1, 1), sgd(), seed=7))["key"]
        {'seed': 7, 'path': []}
    """
    sums = {name: [float(total), float(weight)] for name, (total, weight) in state.sums.items()}
    key = {"seed": state.key.seed, "path": state.key.path}
    numbers: dict[str, Any] = {"key": key, "step": state.step, "epoch": state.epoch}
    numbers |= {"batch": state.batch, "sums": sums, "best": state.best.to_fields()}
    if state.plateau != Plateau():  # as before there was one
        numbers["plateau"] = state.plateau._asdict()
    if state.validations:
        numbers["validations"] = state.validations
    return to_json_data(numbers, "state")


def numbers_to_fields(numbers: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `state_numbers`: keyword arguments of `TrainState`."""
    return {
        "key": Key(numbers["key"]["seed"], tuple(numbers["key"]["path"])),
        "step": numbers["step"],
        "epoch": numbers["epoch"],
        "batch": numbers["batch"],
        "sums": {name: Sum(*pair) for name, pair in numbers["sums"].items()},
        "best": Best(**numbers["best"]),
        "plateau": Plateau(**numbers.get("plateau") or {}),
        "validations": tuple(Validation(*pair) for pair in numbers.get("validations", ())),
    }


def state_from_leaves(leaves: Mapping[str, Tensor], fields: Mapping[str, Any]) -> TrainState:
    """The inverse of `state_leaves` and `numbers_to_fields`."""
    groups: dict[str, dict[str, Tensor]] = {"params": {}, "buffers": {}}
    opt_state: dict[str, Any] = {}
    for path, leaf in leaves.items():
        group, name = path.split("/", 1)
        if group in groups:
            groups[group][name] = leaf
    with_slash = [name for name in groups["params"] if "/" in name]
    for path, leaf in leaves.items():
        if path.startswith("opt_state/"):
            name = max((n for n in with_slash if path.endswith(f"/{n}")), key=len, default=path.rsplit("/", 1)[1])
            part = opt_state
            for key in path.removesuffix(f"/{name}").split("/")[1:]:
                part = part.setdefault(key, {})
            part[name] = leaf
    return TrainState(**groups, opt_state=opt_state, **fields)


def is_starting_count(name: str, leaf: Tensor | Mapping[str, Any]) -> bool:
    """Whether an optimizer's state has a leaf only since a batch did not use its parameter; until then it is 0."""
    return (
        name.startswith("opt_state/")
        and any(part in ("missed", "unused") for part in name.split("/")[1:-1])
        and tuple(leaf["shape"] if isinstance(leaf, Mapping) else leaf.shape) == ()
    )


def tensor_bytes(tensor: Tensor) -> np.ndarray:
    """A tensor's values as an array on the host; dtypes that numpy lacks become integers of the same width.

    Args:
        tensor: any tensor.

    Returns:
        A contiguous array of the tensor's shape. It may share the tensor's memory.

    Example:
        >>> tensor_bytes(torch.ones(2, dtype=torch.bfloat16)).dtype
        dtype('int16')
    """
    host = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    try:
        return host.numpy()
    except TypeError:
        return host.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[host.element_size()]).numpy()


def leaf_digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes.

    Args:
        tensor: any tensor.

    Returns:
        64 hexadecimal digits.

    Example:
        >>> leaf_digest(torch.zeros(2)) == leaf_digest(torch.zeros(1, 2))
        False
    """
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    digest.update(np.ascontiguousarray(tensor_bytes(tensor)).data)
    return digest.hexdigest()


def state_digest(state: TrainState) -> str:
    """SHA-256 of a whole state.

    Args:
        state: the state.

    Returns:
        64 hexadecimal digits.

    Example:
        >>> from dwiml_func import init_state, sgd
        >>> state = init_state(torch.nn.Linear(1, 1), sgd(), seed=7)
        >>> state_digest(state) == state_digest(state.replace(step=1))
        False
    """
    leaves = {name: leaf_digest(tensor) for name, tensor in state_leaves(state).items()}
    return combine_digests(leaves, state_numbers(state))


def combine_digests(leaves: dict[str, str], numbers: dict[str, Any]) -> str:
    """The state's digest from those of its leaves and its numbers; floats count to the last bit."""
    text = json.dumps({"leaves": leaves, "numbers": numbers}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def leaf_differences(table: Sequence[Mapping[str, Any]], like: Mapping[str, Tensor]) -> list[str]:
    """What a table of recorded leaves lacks, has too much, or has with another shape or dtype.

    Args:
        table: rows with `name`, `shape` and `dtype`.
        like: the leaves to expect.

    Returns:
        A text for each difference, with both values, sorted by name.

    Example:
        >>> leaf_differences([{"name": "a", "shape": [2], "dtype": "torch.float64"}], {"a": torch.zeros(3)})
        ['a: float64 (2,) in the checkpoint, float32 (3,) expected']
    """
    saved = {row["name"]: _describe(row["shape"], row["dtype"]) for row in table}
    expected = {name: _describe(leaf.shape, str(leaf.dtype)) for name, leaf in like.items()}
    lines = []
    for name in sorted(saved.keys() | expected.keys()):
        if name not in expected:
            lines.append(f"{name}: {saved[name]} in the checkpoint, not expected")
        elif name not in saved:
            lines.append(f"{name}: not in the checkpoint, {expected[name]} expected")
        elif saved[name] != expected[name]:
            lines.append(f"{name}: {saved[name]} in the checkpoint, {expected[name]} expected")
    return lines


def _describe(shape: Sequence[int], dtype: str) -> str:
    return f"{dtype.removeprefix('torch.')} {tuple(shape)}"
