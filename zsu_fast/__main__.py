"""Runs ``python -m zsu_fast``, the same as the command ``zsu-fast``."""

from .cli.app import main

main()
