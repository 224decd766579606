"""``python -m zsu_fast`` is ``zsu-fast``."""

from .cli import main

main()
