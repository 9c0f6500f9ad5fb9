"""`python -m autoprune.cli`."""

from autoprune.cli import main

main()
