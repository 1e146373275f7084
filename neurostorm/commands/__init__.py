"""The commands of `neurostorm`, and how a command line becomes a configuration.

A command is a module with `main(argv=None) -> exit status`, and its line in `neurostorm/__main__.py`.
"""

import sys
from pathlib import Path


def console_command() -> str:
    """`neurostorm` or `python -m neurostorm` if this process was started so, else ""."""
    started = Path(sys.argv[0])
    if started.stem == "neurostorm":
        return "neurostorm"
    return "python -m neurostorm" if started.parts[-2:] == ("neurostorm", "__main__.py") else ""


def program(name: str, script: str) -> str:
    """How the command `name` was started, for its `--help`: by `script` where it was not as a part of `neurostorm`."""
    return f"{console} {name}" if (console := console_command()) else script
