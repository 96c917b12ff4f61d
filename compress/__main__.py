"""`python -m compress` is the command `compress`, also where another program has its name."""

from compress.cli import main

main()
