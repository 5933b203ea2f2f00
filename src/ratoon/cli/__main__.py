"""`python -m ratoon.cli` is `ratoon`."""

from ratoon.cli import program

program()
