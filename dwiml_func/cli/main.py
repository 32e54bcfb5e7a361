"""`dwiml-func COMMAND ...`: runs the command's module and turns what can go wrong into one line and an exit code."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import io
import logging
import shlex
import sys
from collections.abc import Sequence

import tyro

from dwiml_func._checks import one_line
from dwiml_func.cli._messages import Verbosity, messages, set_verbosity
from dwiml_func.cli._output import drop_unwritable_output, enduring_output, open_standard_streams
from dwiml_func.core.checked_step import StepMismatchError
from dwiml_func.core.memory import keep_freed_memory
from dwiml_func.core.non_finite import NonFiniteError
from dwiml_func.distributed.process_group import ProcessLostError, rank_in
from dwiml_func.experiment.folder import is_sweep
from dwiml_func.experiment.signals import TrainingStopped

__all__ = ["main", "resume_training_from_checkpoint"]

COMMANDS = {
    "train": "Train a model on a dataset, or on the built-in example data.",
    "resume": "Resume an experiment from its latest checkpoint.",
    "fork": "Train a new experiment from a checkpoint of another one, with changed options.",
    "example-data": "Write the built-in example data as an HDF5 dataset.",
    "create-hdf5": "Make an HDF5 dataset from NIfTI files and tractograms.",
    "info": "Print what an HDF5 dataset contains and what is wrong with it.",
    "evaluate": "Print a model's loss and angular error on a subset of a dataset, beside two baselines.",
    "visualize-loss": "Write a model's loss along a subject's streamlines, as coloured tractograms and histograms.",
    "score": "Score a tractogram beside the real streamlines of a dataset's subject.",
    "attention": "Show what a transformer attends to along streamlines.",
    "benchmark": "Train and score models on simulated data of five people, beside baselines and an oracle.",
    "track": "Track streamlines with a model, from a dataset or from NIfTI files.",
    "connectivity": "Count which regions a tractogram's streamlines connect, and compare with real connections.",
    "extract": "Write a volume, streamlines or a connectivity matrix of a dataset's subject as a file.",
    "runs": "Print a table of experiments with their progress and best loss.",
    "plot": "Plot losses, angular errors, gradient norms and speed of experiments.",
    "page": "Write an HTML page about an experiment, with its streamlines in 3-D.",
    "import-dwi-ml": "Make a model directory from a model that dwi_ml trained.",
    "export-dwi-ml": "Write a model for dwi_ml's scripts.",
    "digest": "Print the SHA-256 of an experiment's latest training state.",
    "verify": "Train an epoch again and check that the result is bitwise identical.",
    "diff": "Print what differs between two experiments, and the first epoch that differs.",
    "bisect": "Find the first batch and operation in which two experiments differ.",
    "card": "Print a model card of an experiment.",
    "send-to-comet": "Send an experiment's logs to Comet, or archive them for it.",
}
_TRAINING_COMMANDS = ("train", "resume", "fork")
_CLOSED_PIPE = 141  # as of a program that SIGPIPE ends
_HELP = """Functional training of tractography models.

Example: dwiml-func train experiments first_run

`dwiml-func COMMAND --help` lists the options of a command; `dwiml-func --version` prints the version.

Exit codes:
- 0: success.
- 1: training ended with an error, a comparison found a difference, or a dataset is invalid.
- 2: the command could not start or continue; the message says why.
- 130: Ctrl-C. A training is saved up to its last batch.
- 143: SIGTERM. A training is saved up to its last batch.
- 142: --stop-after. A training is saved up to its last batch."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; `arguments` are those of the command line by default. Returns the exit code."""
    open_standard_streams()
    code = _run(list(sys.argv[1:] if arguments is None else arguments))
    error = drop_unwritable_output()
    if error is None or code != 0:
        return code
    if isinstance(error, BrokenPipeError):
        return _CLOSED_PIPE
    return _fail(f"dwiml-func: standard output cannot be written to: {error.strerror}", 2)


def _run(arguments: list[str]) -> int:
    keep_freed_memory()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal lacks ends no training
    if arguments[:1] == ["--version"]:
        from dwiml_func import __version__

        print(__version__)
        return 0
    command = next((argument for argument in arguments if not argument.startswith("-")), None)
    program = f"dwiml-func {command}" if command in COMMANDS else "dwiml-func"
    sender = f"{program} (process {rank_in()})" if rank_in() > 0 else program
    is_training = False
    with messages(sender):
        try:
            if command is None:
                return _print_help(arguments)
            _check_command(command, arguments)
            arguments.remove(command)  # options may stand before it
            module = importlib.import_module(f"dwiml_func.cli.{command.replace('-', '_')}")
            options = module.Options.parse(arguments, program)
            is_training = command in _TRAINING_COMMANDS
            set_verbosity(Verbosity.QUIET if rank_in() > 0 else options.verbosity)
            with enduring_output() if is_training else contextlib.nullcontext():
                return module.run(options)
        except SystemExit as ended:  # tyro has printed the help or what is wrong
            return int(ended.code or 0)
        except (Exception, KeyboardInterrupt) as error:
            return _report(error, sender, is_training=is_training)


def resume_training_from_checkpoint() -> int:
    """dwi_ml's name for `dwiml-func resume`."""
    return main(["resume", *sys.argv[1:]])


def _print_help(arguments: Sequence[str]) -> int:
    app = tyro.extras.SubcommandApp()
    for name, line in COMMANDS.items():
        app.command(name=name, help=line)(lambda: None)
    app.cli(prog="dwiml-func", description=_HELP, args=arguments or ["--help"])
    return 0


def _check_command(command: str, arguments: Sequence[str]) -> None:
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:  # Python passes on bytes that are not UTF-8 as single surrogates
            raise ValueError(
                f"Expected arguments in UTF-8. Received: {ascii(argument)[:200]}. Rename the file."
            ) from None
    if command not in COMMANDS:
        near = [name for name in COMMANDS if command and name.startswith(command)]
        near += difflib.get_close_matches(command.lower(), COMMANDS, n=1, cutoff=0.7)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"Expected a command among {', '.join(COMMANDS)}. Received: {command!r}.{hint}")


def _report(error: BaseException, sender: str, *, is_training: bool) -> int:
    """Print an error as one line; returns the exit code. An error of ours, not the user's, is raised again."""
    kept = " The last checkpoint is kept." if is_training else ""
    match error:
        case TrainingStopped():
            return error.exit_code if rank_in() > 0 else _fail(f"{sender}: {_resume_hint(error)}", error.exit_code)
        case NonFiniteError() | StepMismatchError() | ProcessLostError():
            return _fail(f"{sender}: {error}", 1)
        case BrokenPipeError():
            drop_unwritable_output()
            return _CLOSED_PIPE
        case ValueError() | OSError() | ModuleNotFoundError():
            logging.getLogger(__name__).debug("", exc_info=error)
            return _fail(f"{sender}: {one_line(error)}", 2)
        case KeyboardInterrupt():
            return _fail(f"{sender}: interrupted.{kept}", 130)
    # torch has no class for a lack of memory
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "allocate memory" in str(error)):
        return _fail(f"{sender}: not enough memory. {one_line(error)}", 2)
    raise error


def _resume_hint(stopped: TrainingStopped) -> str:
    run = shlex.join([str(stopped.directory.parent), stopped.directory.name])
    saved = "before the first batch" if stopped.name is None else f"and saved as checkpoint {stopped.name}"
    if is_sweep(stopped.directory.parent):
        return (
            f"{one_line(stopped)} {saved} of {stopped.directory}. To continue the sweep, give the same command again."
        )
    return f"{one_line(stopped)} {saved}. To resume: dwiml-func resume {run}"


def _fail(message: str, code: int) -> int:
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr)
    return code
