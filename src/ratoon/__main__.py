"""`python -m ratoon` is `ratoon`."""

from ratoon.cli import program

program()
