"""`dwiml-func COMMAND ...`: finds the command's module, and turns errors of the user into one line and exit code 2."""

from __future__ import annotations

import importlib
import logging
import os
import shlex
import sys
from collections.abc import Sequence

from dwiml_func.cli._help import format_block
from dwiml_func.cli._messages import MESSAGE_OPTIONS, Verbosity, messages, take_verbosity
from dwiml_func.cli._parsing import nearest
from dwiml_func.core.step import NonFiniteError
from dwiml_func.distributed.process_group import ProcessLostError, rank_in
from dwiml_func.experiment.signals import TrainingStopped

__all__ = ["main", "resume_training_from_checkpoint"]

COMMANDS = {
    "train": "Train a model on a dataset, or on the built-in example data.",
    "resume": "Go on with an experiment from its latest checkpoint.",
    "fork": "Train a new experiment from a checkpoint of another one, with changed options.",
    "example-data": "Write the built-in example data as an HDF5 dataset.",
    "create-hdf5": "Make an HDF5 dataset of NIfTI files and tractograms.",
    "info": "Print what an HDF5 dataset holds, and what is wrong with it.",
    "evaluate": "Print a model's loss and angular error on a subset of a dataset, beside two baselines.",
    "runs": "Print a table of experiments: how far each has come, and how good it is.",
    "plot": "Draw losses, angular errors, gradients and speed of experiments, over each other.",
    "import-dwi-ml": "Make a model directory of a model that dwi_ml trained.",
    "export-dwi-ml": "Write a model for dwi_ml's scripts.",
    "digest": "Print the SHA-256 of an experiment's latest training state.",
    "verify": "Train an epoch of an experiment again, and compare it with the record bit for bit.",
    "diff": "Tell what differs between two experiments, and from which epoch on.",
    "send-to-comet": "Send an experiment's logs to Comet, or archive them for it.",
}

_OPTIONS = (("--help, -h", "Print this, or a command's help."), ("--version", "Print the version."))
_CLOSED_PIPE = 141  # as a program that SIGPIPE ends
_EXIT_CODES = {
    "0": "All went well.",
    "1": "Training broke off, a comparison found a difference, or a dataset is wrong.",
    "2": "The command could not start, or could not go on; a line tells why.",
    "130": "Ctrl-C. A training is saved up to its last batch.",
    "143": "SIGTERM, the same.",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: the command line without the program's name; None takes `sys.argv`.

    Returns:
        The exit code: 0 when all went well; 1 when training broke off, or a comparison found a difference; 2 when the
        command could not start; 130 after Ctrl-C and 143 after SIGTERM, with the run saved.

    Example:
        >>> main(["no-such-command"])
        2
    """
    verbosity, arguments = take_verbosity(sys.argv[1:] if arguments is None else arguments)
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(_help())
        return 0
    if command == "--version":
        from dwiml_func import __version__

        print(__version__)
        return 0
    for argument in arguments:
        if not _is_text(argument):
            return _fail(
                f"dwiml-func: {ascii(argument)[:200]} is no UTF-8 text. Give names in UTF-8, or rename files.", 2
            )
    if command not in COMMANDS:
        hint = nearest(command.lower(), COMMANDS)
        return _fail(f"dwiml-func: unknown command {command!r}.{hint} Expected one of: {', '.join(COMMANDS)}.", 2)
    program = f"dwiml-func {command}"
    if rank_in() > 0:  # of several processes that train together the first tells about it; each tells its own errors
        program, verbosity = f"{program} (process {rank_in()})", Verbosity.QUIET
    with messages(program, verbosity):
        return _run(command, arguments[1:], program)


def resume_training_from_checkpoint() -> int:
    """The reference's name for `dwiml-func resume`.

    Returns:
        The exit code, as `main`.

    Example:
        >>> resume_training_from_checkpoint()  # doctest: +SKIP
    """
    return main(["resume", *sys.argv[1:]])


def _run(command: str, arguments: Sequence[str], program: str) -> int:
    trains = command in ("train", "resume", "fork")
    try:
        module = importlib.import_module(f"dwiml_func.cli.{command.replace('-', '_')}")
        code = module.run(arguments, program)
        sys.stdout.flush()  # while a closed pipe can still be told
        return code
    except TrainingStopped as stopped:
        return stopped.exit_code if rank_in() > 0 else _fail(_stopped(stopped, program), stopped.exit_code)
    except (NonFiniteError, ProcessLostError) as error:
        return _fail(f"{program}: {error}", 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more as it ends
        if trains and "--help" not in arguments:
            print(f"{program}: what read the output has closed it. The last checkpoint stands.", file=sys.stderr)
        return _CLOSED_PIPE
    except (ValueError, OSError) as error:
        logging.getLogger(__name__).debug("", exc_info=error)
        return _fail(f"{program}: {_one_line(str(error))}", 2)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):  # torch has no class for it
            raise
        return _fail(f"{program}: there is not enough memory. {_one_line(str(error))}", 2)
    except KeyboardInterrupt:
        return _fail(f"{program}: interrupted.{' The last checkpoint stands.' if trains else ''}", 130)


def _help() -> str:
    column = max(map(len, COMMANDS)) + 4
    blocks = {"Commands": COMMANDS.items(), "Options": (*MESSAGE_OPTIONS, *_OPTIONS), "Exit codes": _EXIT_CODES.items()}
    return "\n\n".join(
        [
            "usage: dwiml-func COMMAND ...",
            "Functional training of tractography models.",
            *(format_block(title, rows, column=column) for title, rows in blocks.items()),
            "Example:\n  dwiml-func train experiments first_run",
            "dwiml-func COMMAND --help tells the options of a command.",
        ]
    )


def _stopped(stopped: TrainingStopped, program: str) -> str:
    place = shlex.join([str(stopped.directory.parent), stopped.directory.name])
    saved = "before its first batch" if stopped.name is None else f"and saved as checkpoint {stopped.name}"
    return f"{program}: {_one_line(str(stopped))} {saved}. To go on: dwiml-func resume {place}"


def _is_text(argument: str) -> bool:
    """Whether a config can hold it. Python passes on bytes that are no UTF-8 as single surrogates."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        return False
    return True


def _one_line(text: str) -> str:
    """Without line breaks, and without control characters that a name may bring to the terminal."""
    text = " ".join(text.split())
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def _fail(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code
