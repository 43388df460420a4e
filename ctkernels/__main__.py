"""`python -m ctkernels`: the command line."""

from ctkernels.cli.main import main

main()
