"""`python -m bridge.cli`, for launchers that take a module."""

from bridge.cli.main import main

main()
