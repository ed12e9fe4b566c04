"""``python -m controlkit``: the command line."""

from controlkit.cli import main

main()
