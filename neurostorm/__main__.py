"""The command `neurostorm`, also `python -m neurostorm`: finds a command by its name and starts it.

neurostorm COMMAND [OPTION VALUE ...]          each command is a module of `commands/` with `main()`
"""

import sys
from importlib import import_module

COMMANDS = {
    "ingest": ("commands.ingest", "NIfTI files into a frame store"),
    "pretrain": ("commands.pretrain", "pretrain a masked autoencoder on a frame store"),
    "embed": ("commands.embed", "runs to vectors, with a pretrained model"),
    "finetune": ("commands.finetune", "adapt a model to one task, or run a baseline on it"),
    "sweep": ("commands.sweep", "many tasks and methods on Ray Tune, and their report"),
    "report": ("commands.report", "the report of a sweep, from MLflow alone"),
    "store": ("commands.store", "check, repair, merge, export and look at frame stores; remove a participant"),
    "cohort": ("commands.cohort", "make the synthetic cohort, to try everything on"),
    "upload": ("tracking.upload", "send what a run could not log to MLflow"),
    "doctor": ("commands.doctor", "what this machine has, and what each command lacks here"),
}
USAGE = "usage: neurostorm COMMAND [OPTION VALUE ...]"


def main() -> int:
    """Runs the command of this process's command line; returns the exit status, 2 for a command that is not known."""
    from neurostorm import __version__

    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help", "help"):
        print(_help())
        return 0
    if name == "--version":
        print(f"neurostorm {__version__}")
        return 0
    if name not in COMMANDS:
        from neurostorm.io.errors import did_you_mean

        print(
            f"neurostorm: there is no command {name!r}{did_you_mean(name, COMMANDS)}\nSee: neurostorm --help",
            file=sys.stderr,
        )
        return 2
    sys.argv = [sys.argv[0], *rest]
    try:
        return import_module(f"neurostorm.{COMMANDS[name][0]}").main() or 0
    except ModuleNotFoundError as error:
        if (error.name or "neurostorm").partition(".")[0] == "neurostorm":
            raise
        print(
            f"neurostorm {name}: the package {error.name} is missing: pip install 'neurostorm[all]', or see "
            f"neurostorm doctor {name}",
            file=sys.stderr,
        )
        return 1


def _help() -> str:
    lines = [f"  {name:<10}{text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join([USAGE, "", *lines, "", "neurostorm COMMAND --help explains a command's options."])


if __name__ == "__main__":
    sys.exit(main())
