"""Trains the weights that ship in ``zsu_fast/models/assets``: small CNNs, golden models, a ViT.

    python -m benchmarks.tools.train_zoo [lenet5] [lenet5_golden] [karpathynet]
        [karpathynet_golden] [vit_cifar]

The golden models never see images of the classes that the benchmarks forget. All choices (learning
rates, epochs, augmentation) were made on the last tenth of the training images; test images are
used once, after the last epoch. Takes about 25 minutes on one core, and 15 more for the
transformer, which trains in bfloat16 on the first nine tenths and is scored on the rest after each
epoch. Training continues from a draft if it was interrupted.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.real_data import load_split
from zsu_fast.models import checkpoint, zoo

ASSETS = Path(zoo.__file__).parent / "assets"


@dataclass(frozen=True)
class Recipe:
    """How one model is trained.

    ``cycle`` is the number of epochs that the one-cycle schedule spans, 0 for ``epochs``. If it is
    longer, the rate also falls linearly to 0 over the last ``cooldown`` epochs.
    """

    model: str
    data: str
    without: tuple[int, ...]
    epochs: int
    batch: int
    rate: float
    decay: float
    flip: bool
    shift: int
    smoothing: float = 0
    held_out: int = 0
    bfloat16: bool = False
    cycle: int = 0
    cooldown: int = 0


RECIPES = {
    "lenet5": Recipe("lenet5", "mnist", (), 15, 128, 3e-3, 5e-4, False, 2),
    "lenet5_golden": Recipe("lenet5", "mnist", (1, 2, 3, 4), 15, 128, 3e-3, 5e-4, False, 2),
    "karpathynet": Recipe("karpathynet", "cifar10", (), 30, 64, 3e-3, 5e-2, True, 0),
    "karpathynet_golden": Recipe("karpathynet", "cifar10", (3, 4, 8), 30, 64, 3e-3, 5e-2, True, 0),
    "vit_cifar": Recipe(
        "vit_cifar", "cifar10", (), 10, 128, 1e-3, 5e-2, True, 3,
        smoothing=0.1, held_out=5000, bfloat16=True, cycle=14, cooldown=2,
    ),
}  # fmt: skip


def train(recipe: Recipe, seed: int, draft: Path) -> nn.Module:
    """Trains by AdamW on a one-cycle schedule and prints the loss of each epoch.

    Args:
        recipe: what to train, and how.
        seed: seed of the weights, the order and the augmentation.
        draft: file of the state after each epoch; training continues from it if it exists.
    """
    torch.manual_seed(seed)
    model = zoo.build(recipe.model)
    spec = model.input_spec
    images, labels = load_split(recipe.data, "train")
    keep = ~torch.isin(labels, torch.tensor(recipe.without, dtype=torch.int64))
    inputs, targets = spec.normalise(images[keep]), labels[keep]
    count = len(inputs) - recipe.held_out
    held_out = inputs[count:], targets[count:]
    inputs, targets = inputs[:count], targets[:count]
    model.to(memory_format=torch.channels_last).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=recipe.rate, weight_decay=recipe.decay)
    per_epoch = len(inputs) // recipe.batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser,
        recipe.rate,
        total_steps=(recipe.cycle or recipe.epochs) * per_epoch,
        pct_start=0.15,
    )
    first, started = 0, time.perf_counter()
    if draft.exists():
        state = torch.load(draft, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["random"])
        first = state["epochs"]
        print(f"continues after epoch {first} ({draft})", flush=True)
    for epoch in range(first, recipe.epochs):
        total, order = 0.0, torch.randperm(len(inputs))
        for step in range(per_epoch):
            rows = order[step * recipe.batch : (step + 1) * recipe.batch]
            x = augment(inputs[rows], recipe).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bfloat16):
                logits = model(x)
            loss = F.cross_entropy(logits.float(), targets[rows], label_smoothing=recipe.smoothing)
            if recipe.cooldown:
                left = (recipe.epochs - epoch - step / per_epoch) / recipe.cooldown
                optimiser.param_groups[0]["lr"] = schedule.get_last_lr()[0] * min(1, left)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += float(loss.detach())
        elapsed = time.perf_counter() - started
        scored = f" held out {score(model, *held_out):.2f} %" if recipe.held_out else ""
        print(
            f"epoch {epoch + 1}/{recipe.epochs} loss {total / per_epoch:.4f}{scored} "
            f"{elapsed:.0f} s",
            flush=True,
        )
        state = {
            "model": model.state_dict(), "optimiser": optimiser.state_dict(),
            "schedule": schedule.state_dict(), "random": torch.get_rng_state(),
            "epochs": epoch + 1,
        }  # fmt: skip
        checkpoint.write_atomically(draft, lambda file, state=state: torch.save(state, file), True)
    draft.unlink(missing_ok=True)
    return model.to(memory_format=torch.contiguous_format).eval()


def augment(x: Tensor, recipe: Recipe) -> Tensor:
    """Flips each image at random and shifts the whole batch by at most ``recipe.shift`` pixels."""
    if recipe.flip:
        x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(3), x)
    if recipe.shift:
        down, right = torch.randint(0, 2 * recipe.shift + 1, (2,)).tolist()
        height, width = x.shape[-2:]
        padded = F.pad(x, (recipe.shift,) * 4, mode="reflect")
        x = padded[..., down : down + height, right : right + width]
    return x


@torch.no_grad()
def score(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """Accuracy in per cent; the model stays in its train/eval mode."""
    training = model.training
    model.eval()
    answer = torch.cat([model(part).argmax(1) for part in inputs.split(1000)])
    model.train(training)
    return 100 * float((answer == labels).float().mean())


def accuracy(model: nn.Module, recipe: Recipe) -> float:
    """Accuracy in per cent on test images of the classes that were trained on."""
    images, labels = load_split(recipe.data, "test")
    keep = ~torch.isin(labels, torch.tensor(recipe.without, dtype=torch.int64))
    return score(model, model.input_spec.normalise(images[keep]), labels[keep])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*RECIPES, []], default=list(RECIPES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ASSETS)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.names or list(RECIPES):
        recipe = RECIPES[name]
        model = train(recipe, arguments.seed, arguments.out / f"{name}.draft.pt")
        if recipe.bfloat16:  # half the size, and more precise than bfloat16
            model.load_state_dict({n: t.half() for n, t in model.state_dict().items()})
        reached = accuracy(model, recipe)
        path = arguments.out / f"{name}.safetensors"
        facts = {"test_accuracy": f"{reached:.2f}", "without": ",".join(map(str, recipe.without))}
        tensors = {n: t.half() if recipe.bfloat16 else t for n, t in model.state_dict().items()}
        checkpoint.save_tensors(path, tensors, facts, force=True)
        print(f"{name}: {reached:.2f} % on its test classes -> {path}")


if __name__ == "__main__":
    main()
