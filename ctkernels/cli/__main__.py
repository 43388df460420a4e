"""`python -m ctkernels.cli`."""

from ctkernels.cli.main import main

main()
