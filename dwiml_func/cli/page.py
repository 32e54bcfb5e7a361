"""`dwiml-func page`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dwiml_func._checks import check_number
from dwiml_func.checkpoint.retention import kept_checkpoints
from dwiml_func.cli._output import check_new_file, folders_above
from dwiml_func.cli._parsing import CommandOptions
from dwiml_func.cli.verify import format_audit
from dwiml_func.experiment.audit.audit import audit_experiment
from dwiml_func.experiment.folder import check_no_links
from dwiml_func.experiment.page.page import run_page
from dwiml_func.files.atomic import atomic_write

__all__ = ["Options", "run"]


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Write one HTML file about a run: its tracked and real streamlines to turn by hand in 3-D, scores, curves, config,
    provenance and audit. The file needs no network and no other file.

    Example: dwiml-func page experiments/first_run first_run.html
    """

    experiment_dir: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="EXPERIMENT_DIR")]
    """The experiment's folder, that of a member of an ensemble, or of a run that a script saved."""
    out: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[OUT.html]")] = None
    """The file to write; missing folders are made. None: page.html in the experiment's folder."""
    sample: Annotated[int | None, tyro.conf.arg(metavar="K")] = None
    """Audit the run before, as `verify --sample K` does, and write into the page what came out. None: the page says
    that the run is not audited."""
    overwrite: Annotated[bool, tyro.conf.arg(aliases=["-f"])] = False
    """Replace an existing file."""


def run(options: Options) -> int:
    """Write the page. Returns 1 when an audit found a difference; the page then says so."""
    directory = Path(options.experiment_dir)
    out = directory / "page.html" if options.out is None else Path(options.out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"Expected a name that ends in .html. Received: {str(out)!r}.")
    check_number("sample", options.sample, at_least=1)
    check_new_file(out, overwrite=options.overwrite)
    with kept_checkpoints(directory):  # of a run that is being trained
        audit = None if options.sample is None else audit_experiment(directory, sample=options.sample)
        lines = None if audit is None else format_audit(audit, directory.resolve().name).splitlines()
        page = run_page(directory, audit=lines)
    if options.out is None:
        check_no_links(directory)
    with folders_above(out):
        atomic_write(out, page.encode())
    print(out)
    return 0 if audit is None or (audit.replayed and not audit.problems) else 1
