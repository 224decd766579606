"""``python -m zsu_fast`` is ``zsu-fast``."""

from .cli.app import main

main()
