"""Make a trained LeNet5 forget the digits 1, 2, 3 and 4 without any training data.

The weights ship with the package, and so do the 2,000 real MNIST test images, which are used for
measuring only. Takes about 15 seconds on one CPU core and prints::

    original: FA 99.88 % of 800 images of the forgotten classes, RA 98.67 % of 1200 others, ...
    mask: FA 0.00 % of 800 images of the forgotten classes, RA 99.58 % of 1200 others, ...
    unlearned: FA 0.00 % of 800 images of the forgotten classes, RA 99.25 % of 1200 others, ...

FA is the accuracy on the forgotten classes, RA that on the others. The mask sets the forgotten
logits to -inf: it hides the classes at no cost, and is the baseline for any method. ``unlearn``
changes the features too, which costs a little RA; ``depth="output"`` keeps the mask's RA in a tenth
of the time, but the original last layer brings the classes back (see ``deep.py``).
"""

import zsu_fast
from zsu_fast.cli.demo import mnist_test
from zsu_fast.models.loading import load_model

forget = [1, 2, 3, 4]
model = load_model("lenet5")
unlearned = zsu_fast.unlearn(model, forget=forget)  # a copy: `model` is left unchanged

data = mnist_test()
print("original:", zsu_fast.evaluate(model, data, forget))
print("mask:", zsu_fast.evaluate(zsu_fast.mask(model, forget), data, forget))
print("unlearned:", zsu_fast.evaluate(unlearned, data, forget))
