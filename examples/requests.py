"""Two requests to forget, one after the other, with a ledger and a delta.

Each request starts from the result of the one before. The ledger remembers which classes are
forgotten already, so that they stay forgotten; its entries are chained by their hashes. A delta
holds only the tensors that a request changed: whoever has the model before the request rebuilds
the one after it, bit for bit.

Both requests forget at the output level, which is quick: only the rows of the forgotten classes in
the last layer change. Leave out ``depth`` to forget in the features too (10 seconds per request).

Takes about 5 seconds on one CPU core, writes into a temporary folder, and prints::

    after R-1: FA 0.00 % of 200 images of the forgotten classes, RA 99.33 % of 1800 others, ...
    after R-2: FA 0.00 % of 400 images of the forgotten classes, RA 99.44 % of 1600 others, ...
    ledger: R-1 forgot [5], R-2 forgot [2] (forgotten before: [5])
    delta: 3,736 bytes, rebuilt bit for bit: True
"""

import tempfile
from pathlib import Path

import torch

import zsu_fast
from zsu_fast import Ledger
from zsu_fast.cli.demo import mnist_test
from zsu_fast.models.loading import load_model

original, data = load_model("lenet5"), mnist_test()

with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    ledger = folder / "ledger.jsonl"

    monday = zsu_fast.unlearn(original, [5], depth="output", ledger=Ledger(ledger, "R-1"))
    print("after R-1:", zsu_fast.evaluate(monday, data, [5]))

    tuesday = zsu_fast.unlearn(monday, [2], depth="output", ledger=Ledger(ledger, "R-2"))
    print("after R-2:", zsu_fast.evaluate(tuesday, data, [2, 5]))

    first, second = Ledger(ledger).entries()  # raises if an entry was edited or removed
    print(
        f"ledger: {first['request']} forgot {first['forget']}, {second['request']} forgot "
        f"{second['forget']} (forgotten before: {second['forgotten']})"
    )

    delta = folder / "tuesday.delta.safetensors"
    zsu_fast.save_delta(monday, tuesday, delta)
    rebuilt = zsu_fast.apply_delta(monday, delta).state_dict()
    same = all(torch.equal(value, rebuilt[key]) for key, value in tuesday.state_dict().items())
    print(f"delta: {delta.stat().st_size:,} bytes, rebuilt bit for bit: {same}")
