"""
Class impressions, before and after
===================================

A LeNet5 trained on MNIST forgets the digits 1, 2, 3 and 4 at the output level. No training image is
used: the network learns from *class impressions*, images synthesised from the network itself. This
page shows them, what the network answers before and after, and what is still inside. By default,
layers ahead of the last one are trained too, and nothing is synthesised that could be shown.

Running it takes about 5 seconds on one CPU core. The 2,000 MNIST test images ship with the
package and are used for measuring only.
"""

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

import zsu_fast
from zsu_fast.cli.demo import mnist_test
from zsu_fast.models.loading import load_model

FORGET = [1, 2, 3, 4]
model = load_model("lenet5")
images, labels = mnist_test()

# %%
# What the network takes for a digit
# ----------------------------------
#
# Each impression starts as grey noise, and gradient ascent raises one logit until the network is
# as confident as a target drawn from 0.55 to 0.99. To us most of them are noise; the network sees
# a digit in every one. Each column below is a class.

unlearner = zsu_fast.ZeroShotUnlearner(model, FORGET, depth="output", space="input", seed=0)
impressions = unlearner.synthesise()
rows = 4

figure, axes = plt.subplots(rows, 10, figsize=(10, 4.4), layout="constrained")
for digit in range(10):
    mine = (impressions.labels == digit).nonzero()[:rows, 0]
    for axis, row in zip(axes[:, digit], mine.tolist(), strict=True):
        axis.imshow(impressions.images[row, 0].numpy(), cmap="gray")
        axis.set_title(f"{impressions.confidence[row]:.2f}", fontsize=8)
        axis.axis("off")
figure.suptitle("Impressions of the digits 0 to 9, and the network's confidence")
plt.show()

with torch.no_grad():
    agreement = (model(impressions.images).argmax(1) == impressions.labels).float().mean()
print(f"{len(impressions)} impressions, {100 * agreement:.0f} % answered with their class")

# %%
# Forgetting
# ----------
#
# The network is split at its last layer, and that layer is fitted to the impressions until the
# network answers like the original with the four digits taken out. The mask, which sets their
# logits to minus infinity, is the baseline: it shows what the other digits can gain at best.

unlearned = unlearner.run()
models = {
    "original": model,
    "mask": zsu_fast.mask(model, FORGET),
    "unlearned": unlearned,
}
figure, axis = plt.subplots(figsize=(8, 3.2), layout="constrained")
for place, (name, each) in enumerate(models.items()):
    result = zsu_fast.evaluate(each, (images, labels), FORGET)
    print(f"{name}: {result}")
    axis.bar(
        [digit + 0.27 * (place - 1) for digit in result.per_class],
        list(result.per_class.values()),
        width=0.25,
        label=name,
    )
axis.set(xticks=range(10), xlabel="digit", ylabel="accuracy on test images, %")
axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
plt.show()

# %%
# Answers on real digits
# ----------------------
#
# Where a forgotten digit was, the network now answers with the next best class, often with little
# confidence. Digits that stay are answered as before.

chosen = [int((labels == digit).nonzero()[0, 0]) for digit in (1, 2, 4, 0, 7, 9)]
with torch.no_grad():
    before, after = (each(images[chosen]).softmax(1).numpy() for each in (model, unlearned))

figure, axes = plt.subplots(2, len(chosen), figsize=(10, 3.6), layout="constrained")
for column, row in enumerate(chosen):
    axes[0, column].imshow(images[row, 0].numpy(), cmap="gray")
    axes[0, column].axis("off")
    axes[1, column].bar(range(10), before[column], width=0.9, alpha=0.4, label="original")
    axes[1, column].bar(range(10), after[column], width=0.5, label="unlearned")
    axes[1, column].set(xticks=range(10), ylim=(0, 1), yticks=[])
    axes[1, column].tick_params(labelsize=7)
axes[1, 0].set_ylabel("probability")
axes[1, 0].legend(fontsize=7)
plt.show()

# %%
# What is still inside
# --------------------
#
# Only the last layer has changed, so its inputs are the same as ever: the forgotten digits still
# form separate clusters, and putting the original last layer back would recover them. With
# ``depth="deep"``, the default, the features change too (see ``deep.py``).


def features(network: nn.Module) -> Tensor:
    """The inputs of the last layer, float32 [N, 84]."""
    seen: list[Tensor] = []
    hook = network.fc3.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        network(images)
    hook.remove()
    return seen[0]


old, new = features(model), features(unlearned)
print(f"largest change of a feature: {(new - old).abs().max():.1f}")

centred = new - new.mean(0)
plane = centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:2].T
figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
for digit in range(10):
    mine = labels == digit
    mark = "x" if digit in FORGET else "o"
    axis.scatter(*plane[mine].T.numpy(), s=14, marker=mark, color=f"C{digit}", label=str(digit))
axis.set(title="Features after forgetting, two principal components", xticks=[], yticks=[])
axis.legend(title="digit", loc="upper left", bbox_to_anchor=(1, 1))
plt.show()
