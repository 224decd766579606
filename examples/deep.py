"""Forget classes in the features too, not only in the outputs.

By default only the last layer of LeNet5 changes. The un-mask test shows what that leaves behind:
put the original last layer back, and the forgotten digits are recognised again. With
``depth="deep"`` the layers before it are trained as well, and the digits stay forgotten.

Takes about 20 seconds on one CPU core. Prints the accuracy on 2,000 MNIST test images, as it is
and with the original last layer put back (FA: forgotten classes, RA: the others)::

    output: FA 0.00 % ..., RA 99.58 % ...
    output, original last layer back: FA 99.88 % ..., RA 98.67 % ...
    deep: FA 0.00 % ..., RA 98.50 % ...
    deep, original last layer back: FA 0.12 % ..., RA 98.75 % ...
"""

import zsu_fast
from zsu_fast.cli.demo import mnist_test
from zsu_fast.models.loading import load_model

forget = [1, 2, 3, 4]
model, data = load_model("lenet5"), mnist_test()

for depth in ("output", "deep"):
    unlearned = zsu_fast.unlearn(model, forget, depth=depth)
    print(f"{depth}:", zsu_fast.evaluate(unlearned, data, forget))

    unlearned.fc3.load_state_dict(model.fc3.state_dict())  # the un-mask test
    result = zsu_fast.evaluate(unlearned, data, forget)
    print(f"{depth}, original last layer back:", result)
