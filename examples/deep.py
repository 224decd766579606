"""Deep and output level compared: what does the original last layer still recognise?

At the output level only the last layer of LeNet5 changes. The un-mask test shows what that leaves
behind: put the original last layer back, and the forgotten digits are recognised again. With
``depth="deep"``, the default, the layers ahead of it are trained too, and the digits stay
forgotten. An attacker who has images can do more: re-fit the original last layer to the new
features by ridge regression. Deep forgetting hardly prevents that on LeNet5.

Takes about 25 seconds on one CPU core. Prints the accuracy on 2,000 MNIST test images, which are
used for measuring only (FA: forgotten classes, RA: the others)::

    output: FA 0.00 % ..., RA 99.58 % ...
    output, original last layer back: FA 99.88 % ..., RA 98.67 % ...
    output, original last layer re-fitted: FA 99.83 %, RA 98.56 %
    deep: FA 0.00 % ..., RA 99.25 % ...
    deep, original last layer back: FA 0.00 % ..., RA 99.25 % ...
    deep, original last layer re-fitted: FA 96.00 %, RA 97.00 %
"""

import zsu_fast
from zsu_fast.cli.demo import mnist_test
from zsu_fast.models.loading import load_model

forget = [1, 2, 3, 4]
model, data = load_model("lenet5"), mnist_test()

for depth in ("output", "deep"):
    unlearned = zsu_fast.unlearn(model, forget, depth=depth)
    print(f"{depth}:", zsu_fast.evaluate(unlearned, data, forget))

    audit = zsu_fast.audit(model, unlearned, forget, data=data, relearn_steps=0)
    row = audit.row("unlearned")
    fa, ra = row.get("adapted_unmask_fa"), row.get("adapted_unmask_ra")

    unlearned.fc3.load_state_dict(model.fc3.state_dict())  # the un-mask test
    print(f"{depth}, original last layer back:", zsu_fast.evaluate(unlearned, data, forget))
    print(f"{depth}, original last layer re-fitted: FA {fa:.2f} %, RA {ra:.2f} %")
