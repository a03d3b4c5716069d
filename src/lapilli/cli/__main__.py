"""`python -m lapilli.cli` is `lapilli`."""

from lapilli.cli.main import main

main()
