"""Charts of what was forgotten (matplotlib, the ``plots`` extra)."""

from __future__ import annotations

from pathlib import Path

from . import checkpoint
from .errors import ZsuFastError
from .evaluation import Evaluation

# Okabe and Ito's palette: told apart with every kind of colour vision.
BEFORE, AFTER, THIRD = "#0072B2", "#E69F00", "#009E73"


def class_accuracy(
    evaluations: dict[str, Evaluation],
    path: str | Path,
    title: str,
    names: list[str] | None = None,
    force: bool = False,
) -> None:
    """Bars of each class's accuracy, one colour a model (the paper's Figures 1 and 2), as PNG.

    Args:
        evaluations: label -> evaluation of the same images, up to three.
        path: the file to write.
        title: above the chart.
        names: of the classes; None for their numbers.
        force: replace an existing file.

    Raises:
        ZsuFastError: matplotlib is not installed.
        OutputError: the file can't be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ZsuFastError(
            f"The chart needs matplotlib ({error}). Run pip install 'zsu-fast[plots]'."
        ) from error
    first = next(iter(evaluations.values()))
    classes = sorted(first.per_class)
    figure = Figure(figsize=(max(6.0, 0.75 * len(classes)), 3.6), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(evaluations)
    for i, (label, evaluation) in enumerate(evaluations.items()):
        left = [k - 0.4 + width * (i + 0.5) for k in range(len(classes))]
        heights = [evaluation.per_class[c] for c in classes]
        colour = (BEFORE, AFTER, THIRD)[i]
        axes.bar(left, heights, width, label=label, color=colour)
        for x, height in zip(left, heights, strict=True):
            if height < 1:  # a bar that can't be seen still says what it is
                axes.text(x, 1, f"{height:.0f}", ha="center", va="bottom", fontsize=7)
    for k, c in enumerate(classes):
        if c in first.forget:
            axes.axvspan(k - 0.5, k + 0.5, color="#999999", alpha=0.18, zorder=0, lw=0)
    axes.set_xticks(range(len(classes)), [names[c] if names else str(c) for c in classes])
    axes.set(ylim=(0, 100), ylabel="accuracy, %", xlabel="class (grey: forgotten)", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, frameon=False)
    checkpoint.write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=150),
                                force)  # fmt: skip
