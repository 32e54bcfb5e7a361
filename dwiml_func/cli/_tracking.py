"""Parts of `dwiml-func track`: the check of its options, the texts for headers, the bar."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from dwiml_func._checks import check_number
from dwiml_func.cli._messages import is_quiet
from dwiml_func.cli._output import check_new_file
from dwiml_func.data.tractogram_writers import check_name
from dwiml_func.experiment.model_store import LoadedModel
from dwiml_func.experiment.training_facts import TRAINED_ON
from dwiml_func.tracking.track import Tracked

__all__ = ["check_options", "header_facts", "seed_columns", "with_progress"]

_WITHOUT_EFFECT = ("model_dir", "paths", "processes", "simultaneous_tracking", "overwrite", "verbose", "quiet")
"""Options that lines do not depend on, or that the header has in another form."""


def check_options(options: Any) -> str:
    """Check what needs no other file; returns the name of the tractogram."""
    check_number("processes", options.processes, at_least=1)
    check_number("simultaneous_tracking", options.simultaneous_tracking, at_least=1)
    check_number("skip", options.skip, at_least=0)
    check_number("compress", options.compress, above=0)
    if options.processes > 1 and options.use_gpu:
        raise ValueError("processes: expected 1 with --use-gpu, where one process keeps the GPU busy.")
    given = [option for option in ("npv", "nt", "in_custom_seeds") if getattr(options, option) is not None]
    if len(given) > 1:
        raise ValueError(f"{given[0]}: not allowed with {given[1]}. Received both. Leave one out.")
    of_nifti = {"seeding_mask", "tracking_mask", "standardization", "std_mask"}
    of_dataset = {"subject", "input_group_name", "seeding_mask_group", "tracking_mask_group"}
    for name in sorted(of_dataset if options.input else of_nifti):
        if getattr(options, name):
            needs = "a dataset, not --input" if options.input else "--input FILE.nii.gz"
            raise ValueError(f"{name}: requires {needs}. Leave it out.")
    expected = 1 if options.input else 2
    if len(options.paths) != expected:
        names = "OUT, as --input is given" if options.input else "HDF5_FILE and OUT (or --input FILE.nii.gz and OUT)"
        raise ValueError(f"Expected {names}. Received: {shlex.join(options.paths) or 'nothing'}.")
    if not options.input and options.subject is None:
        raise ValueError("subject: expected the name of a subject of the dataset. Received none. Give --subject.")
    out = options.paths[-1]
    check_name(Path(out), columns=seed_columns(options.save_seeds))
    check_new_file(out, overwrite=options.overwrite)
    return out


def header_facts(options: Any, model: LoadedModel) -> dict[str, str]:
    """Texts for a tractogram's header: of the model, and of the options that lines depend on."""
    given = []
    for field in fields(options):
        value = getattr(options, field.name)
        if field.name not in _WITHOUT_EFFECT and value != field.default:
            given += [f"--{field.name.replace('_', '-')}", *_words(value)]
    sources = options.paths[:-1]
    epoch = model.facts.get("epoch")
    name = f"{model.facts['class']} {model.config.model.dg_key}" + (f", epoch {epoch}" if epoch is not None else "")
    from dwiml_func import __version__

    return {
        "program": f"dwiml-func {__version__}",
        "model": name,
        "trained_on": json.dumps(model.facts.get(TRAINED_ON, {})),
        "command": shlex.join(["dwiml-func", "track", options.model_dir, *sources, *given]),
    }


def _words(value: object) -> list[str]:
    if value is True:
        return []
    return [str(word) for word in value] if isinstance(value, tuple) else [str(value)]


def with_progress(results: Iterator[Tracked], num_seeds: int) -> Iterator[Tracked]:
    """Show a bar of seeds on standard error if it is a terminal."""
    from tqdm import tqdm

    with tqdm(total=num_seeds, unit="seed", disable=is_quiet() or not sys.stderr.isatty()) as bar:
        for tracked in results:
            bar.update(tracked.num_done - bar.n)
            yield tracked


def seed_columns(save_seeds: bool) -> dict[str, int]:
    """The columns of data per streamline of a tracking."""
    return {"seeds": 3} if save_seeds else {}
