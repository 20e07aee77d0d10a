"""The command line. The same names as in Python; every error of the user is one line and code 2."""

from noiseproof.cli.commands import COMMANDS, main

__all__ = ["COMMANDS", "main"]
