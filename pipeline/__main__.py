"""`python -m pipeline` is `edgestill`."""

from pipeline.cli import main

main()
