"""How long importing the package and printing its help take, beside torch's own import.

    python -m benchmarks.tools.import_time              # the median of five, in seconds
    python -m benchmarks.tools.import_time --check      # exit 1 if one takes 2 s longer than torch

Each is a new process, after one that is not counted, in turn.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

COMMANDS = {
    "import torch": ["-c", "import torch"],
    "import zsu_fast": ["-c", "import zsu_fast"],
    "zsu-fast --help": ["-m", "zsu_fast", "--help"],
}
MOST = 2.0  # seconds beyond torch's own import


def measure(repeats: int) -> dict[str, float]:
    """Median seconds of each command."""
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for number in range(repeats + 1):
        for name, arguments in COMMANDS.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
            if number:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    taken = measure(options.repeats)
    for name, seconds in taken.items():
        print(f"{name:16} {seconds:5.2f} s, {seconds - taken['import torch']:+5.2f}")
    if options.check and max(taken.values()) - taken["import torch"] > MOST:
        sys.exit(f"more than {MOST:g} s beyond torch's own import")


if __name__ == "__main__":
    main()
