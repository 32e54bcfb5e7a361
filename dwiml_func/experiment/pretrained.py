"""Weights of another model, loaded by name and shape into any module."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dwiml_func._checks import at_most_three, listed, one_line
from dwiml_func.checkpoint.arrays import load_leaves
from dwiml_func.checkpoint.checkpoint import newest
from dwiml_func.checkpoint.digest import combine_digests, leaf_digest
from dwiml_func.checkpoint.index import list_checkpoints
from dwiml_func.checkpoint.manifest import read_manifest
from dwiml_func.files.archive import check_archive

__all__ = ["PretrainedReport", "load_pretrained", "read_tensors"]

_WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Where training programs put the state dict in a file that holds more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainedReport:
    """What `load_pretrained` did.

    Args:
        loaded: names of the module's parameters and buffers that were written.
        missing: names of the module that the source lacks; they keep their values.
        unexpected: names of the source that the module lacks.
        other_shape: for each name of another shape, the shape in the source and that in the module.
        digest: SHA-256 of the names and values that were written.

    Example:
        >>> report = PretrainedReport(loaded=("weight",), missing=("bias",), unexpected=(), other_shape={}, digest="")
        >>> print(report)
        loaded: weight; missing: bias; unexpected: none; of another shape: none
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    other_shape: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    digest: str

    def __str__(self) -> str:
        shapes = [f"{name} {source}, expected {own}" for name, (source, own) in self.other_shape.items()]
        return (
            f"loaded: {listed(self.loaded)}; missing: {listed(self.missing)}; unexpected: {listed(self.unexpected)}; "
            f"of another shape: {at_most_three(shapes, ', ') or 'none'}"
        )


def load_pretrained(module: torch.nn.Module, path: str | Path) -> PretrainedReport:
    """Write weights from disk into a module, in place, where name and shape fit.

    The module keeps its dtypes, its device and its tied weights. Call it before `init_state`.

    Args:
        module: any module.
        path: a file of `torch.save(module.state_dict())`, a model directory, an experiment (its best model or, without
            one, its newest checkpoint), or a checkpoint's folder.

    Returns:
        What was loaded, and what did not fit.

    Raises:
        FileNotFoundError: there is nothing at that path.
        ValueError: nothing fits, or it is none of these. Nothing is written then.

    Example:
        >>> import tempfile
        >>> model, trained = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3, bias=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save(trained.state_dict(), f"{folder}/trained.pt")
        ...     print(load_pretrained(model, f"{folder}/trained.pt"))
        loaded: weight; missing: bias; unexpected: none; of another shape: none
    """
    source = read_tensors(path)
    own = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    loaded = {name: source[name] for name in own if name in source and source[name].shape == own[name].shape}
    written = {id(own[name]) for name in loaded}  # of tied weights, one name is enough
    report = PretrainedReport(
        loaded=tuple(loaded),
        missing=tuple(name for name in own if name not in source and id(own[name]) not in written),
        unexpected=tuple(name for name in source if name not in own),
        other_shape={
            name: (tuple(source[name].shape), tuple(own[name].shape))
            for name in own
            if name in source and name not in loaded
        },
        digest=combine_digests({name: leaf_digest(tensor) for name, tensor in loaded.items()}, {}),
    )
    for name, tensor in loaded.items():
        if own[name].is_meta or (tensor.is_complex() and not own[name].is_complex()):
            why = (
                "is on the meta device: call module.to_empty first"
                if own[name].is_meta
                else "would lose its imaginary part"
            )
            raise ValueError(f"Nothing was loaded from {path}: {name} {why}.")
    if not loaded:
        raise ValueError(f"Nothing in {path} fits the module {type(module).__name__} by name and shape: {report}.")
    with torch.no_grad():
        for name, tensor in loaded.items():
            own[name].copy_(tensor)
    return report


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The parameters and buffers of any source that `load_pretrained` takes, by name, on the CPU."""
    from dwiml_func.experiment.model_store import MANIFEST, find_model  # which brings models and data

    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"No model at {path}. Expected a torch.save file, a model directory or an experiment.")
    if path.is_file():
        return _read_file(path)
    if (path / "manifest.json").is_file():
        return _without_groups(load_leaves(path))
    if not any((folder / MANIFEST).is_file() for folder in (path, path / "best_model")) and list_checkpoints(path):
        found = newest(path)
        assert found is not None
        return {**found.state.params, **found.state.buffers}
    folder = find_model(path)
    return load_leaves(folder, read_manifest(folder, MANIFEST))


def _read_file(path: Path) -> dict[str, Tensor]:
    check_archive(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        # torch's text about an unsafe file says how to load it all the same
        why = "" if isinstance(error, pickle.UnpicklingError) else f": {one_line(error, max_length=200)}"
        raise ValueError(
            f"{path} is no state dict that torch can read safely{why}. It may hold a whole module, or other Python "
            f"objects. Write it with torch.save(module.state_dict(), ...)."
        ) from None
    for name in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: expected a state dict, tensors by name. Received: {type(content).__name__}")
    return {str(name): tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}


def _without_groups(leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    named = [(*name.partition("/"), leaf) for name, leaf in leaves.items()]
    return {name: leaf for group, _, name, leaf in named if group in ("params", "buffers")}
