"""Labelled data in many layouts: the right FA and RA, or an error, never those of wrong classes.

    python -m benchmarks.stress.fuzz_data                # 3,000 cases
    python -m benchmarks.stress.fuzz_data --cases 200

The model tells classes by the brightness of an image. Some images of each class have the next
class's brightness, a different share in each, so that the right FA and RA are known, and classes
that are mixed up change them. Cases are folders (numbers, names, WordNet ids; padded, renamed,
nested, empty, hidden, of another case), .npz files, dict batches and data sets, with and without
names of the model's classes. Takes a minute or two. Writes ``results/fuzz_data.md``.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.harness import RESULTS
from zsu_fast import ZsuFastError, evaluate
from zsu_fast.cli.inputs import folder_order, parse_classes, read_images
from zsu_fast.models.input_spec import InputSpec
from zsu_fast.models.labels import Labels, known_labels

STEP = 20  # brightness of class c: STEP * c
SPEC = InputSpec((3, 8, 8), (0.0,) * 3, (1.0,) * 3, "the fuzz")
WORDS = ("tench", "goldfish", "great white shark", "tiger shark", "hen", "ostrich", "brambling",
         "junco", "robin", "jay", "Äpfel", "日本", "niño", "crème brûlée", "Ñandú")  # fmt: skip


class Brightness(nn.Module):
    """Predicts the class by mean brightness: float [N, 3, H, W] in 0..1 -> logits [N, classes]."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.arange(classes) * STEP / 255)
        self.input_spec = SPEC

    def forward(self, x: Tensor) -> Tensor:
        return -1000 * (x.mean((1, 2, 3))[:, None] - self.centres).abs()


@dataclass
class Truth:
    """A model, and how many images of each class it gets right.

    Attributes:
        names: of its classes, by index; what folders are called where they have names.
        pixels: class -> brightness of each of its images.
        known: how the model's names are passed: "model", "list", "text", "json", or "" for not.
    """

    random: random.Random
    classes: int
    names: list[str]
    known: str
    forget: list[int]
    pixels: dict[int, list[int]] = field(default_factory=dict)

    @classmethod
    def draw(cls, seed: int) -> Truth:
        draw = random.Random(seed)
        classes = draw.randint(4, 10)
        names = draw.sample(WORDS, classes)
        if draw.random() < 0.2:
            names = [f"n{draw.randrange(10**7, 10**8)}" for _ in names]
        known = draw.choice(("model", "list", "text", "json", "", ""))
        truth = cls(draw, classes, names, known, sorted(draw.sample(range(classes), 2)))
        for c in range(classes):
            right, other = 3 + c, 1 + c % 2
            pixels = [STEP * c] * right + [STEP * ((c + 1) % classes)] * other
            truth.pixels[c] = draw.sample(pixels, len(pixels))
        return truth

    def expected(self) -> tuple[float | None, float | None]:
        """The right FA and RA, in per cent."""
        totals = []
        for chosen in (set(self.forget), set(range(self.classes)) - set(self.forget)):
            rows = [p == STEP * c for c in chosen for p in self.pixels.get(c, [])]
            totals.append(100 * sum(rows) / len(rows) if rows else None)
        return totals[0], totals[1]

    def model(self) -> nn.Module:
        model = Brightness(self.classes)
        if self.known == "model":
            model.class_names = list(self.names)  # type: ignore[assignment]
        return model

    def class_names(self, folder: Path) -> Any:
        if self.known in ("", "model"):
            return None
        if self.known == "list":
            return list(self.names)
        path = folder.with_name("names.txt" if self.known == "text" else "names.json")
        by_index = self.random.choice((
            {str(i): n for i, n in enumerate(self.names)}, {n: i for i, n in enumerate(self.names)},
            self.names,
        ))  # fmt: skip
        text = json.dumps(by_index) if self.known == "json" else "\n".join(self.names)
        path.write_text(text, encoding="utf-8")
        return str(path)

    def arrays(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        rows = [(p, c) for c, pixels in self.pixels.items() for p in pixels]
        self.random.shuffle(rows)
        values = np.array([p for p, _ in rows], dtype=np.uint8)
        images = np.broadcast_to(values[:, None, None, None], (len(rows), 3, 8, 8)).copy()
        return images, np.array([c for _, c in rows])


@cache
def png(value: int) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (9, 9), (value,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, values: list[int]) -> None:
    path.mkdir(parents=True, exist_ok=True)
    for number, value in enumerate(values):
        (path / f"{number}.png").write_bytes(png(value))


def folders(truth: Truth, folder: Path) -> tuple[Any, str]:
    """Writes the images into folders named in some way, with some disorder; returns the source."""
    draw = truth.random
    style = draw.choice(("number", "padded", "name", "case", "underscore", "mixed", "numbered",
                         "one-based", "lettered"))  # fmt: skip
    order = draw.sample(range(truth.classes), truth.classes)
    spell: dict[str, Callable[[int], str]] = {
        "number": str,
        "padded": lambda c: f"{c:04d}",
        "name": lambda c: truth.names[c],
        "case": lambda c: draw.choice((str.upper, str.title, str.lower))(truth.names[c]),
        "underscore": lambda c: truth.names[c].replace(" ", "_"),
        "mixed": lambda c: draw.choice((str(c), truth.names[c])),
        "numbered": lambda c: f"{c + 1:03d}.{truth.names[c]}",
        "one-based": lambda c: str(c + 1),
        "lettered": lambda c: "abcdefghij"[order[c]],
    }
    change = draw.choice(("", "", "", "missing", "empty", "hidden", "extra", "twice", "nested",
                          "wrapped", "beside"))  # fmt: skip
    for c in range(truth.classes):
        place = folder / spell[style](c)
        if c == 0 and change in ("missing", "empty"):
            truth.pixels.pop(c)
            if change == "empty":
                place.mkdir(parents=True)
            continue
        write(place / "deep" if change == "nested" else place, truth.pixels[c])
    if change == "hidden":
        write(folder / draw.choice((".git", "__MACOSX", ".ipynb_checkpoints")), [0, 1])
        next(folder.glob("[!.]*")).joinpath("._0.png").write_bytes(b"resource fork")
    if change == "extra":
        write(folder / draw.choice(("unknown", str(truth.classes), "-1", "1.5")), [0, STEP])
    if change == "twice":
        again = folder / draw.choice(("00", "0000000", truth.names[0].upper()))
        if not again.exists():
            write(again, [STEP, STEP])
    if change == "beside":
        (folder / "readme.txt").write_text("images")
    if change == "wrapped":
        (folder.parent / "outer").mkdir()
        folder = folder.rename(folder.parent / "outer" / "train")
        return read_images(str(folder.parent), SPEC), f"folders, {style}, {change}"
    return read_images(str(folder), SPEC), f"folders, {style}, {change or 'plain'}"


def npz(truth: Truth, folder: Path) -> tuple[Any, str]:
    """Writes the images as .npz, in some spelling and layout."""
    draw = truth.random
    images, labels = truth.arrays()
    kind = draw.choice(("plain", "channels last", "column", "float labels", "one-hot", "names",
                        "one-based", "negative", "float images", "int images", "test part",
                        "upper case", "strange keys", "short", "two pairs"))  # fmt: skip
    keys = draw.choice((("images", "labels"), ("x", "y"), ("data", "targets"), ("arr_0", "arr_1")))
    if kind == "channels last":
        images = images.transpose(0, 2, 3, 1)
    elif kind == "column":
        labels = labels[:, None]
    elif kind == "float labels":
        labels = labels + draw.choice((0.0, 0.5))
    elif kind == "one-hot":
        labels = np.eye(truth.classes)[labels]
    elif kind == "names":
        labels = np.array(truth.names)[labels]
    elif kind == "one-based":
        labels = labels + 1
    elif kind == "negative":
        labels = labels - 1
    elif kind == "float images":
        images = images.astype(np.float32) / 255
    elif kind == "int images":
        images = images.astype(np.int64)
    elif kind == "short":
        labels = labels[:-1]
    arrays: dict[str, Any] = {keys[0]: images, keys[1]: labels}
    if kind == "test part":
        arrays = {"x_train": images[::-1], "y_train": labels, "x_test": images, "y_test": labels}
    elif kind == "upper case":
        arrays = {"Images": images, "LABELS": labels}
    elif kind == "strange keys":
        arrays = {"pictures": images, "answers": labels}
    elif kind == "two pairs":
        arrays = {"x": images, "y": labels, "data": images[::-1], "targets": labels}
    path = folder.with_suffix(".npz")
    np.savez(path, **arrays)
    return read_images(str(path), SPEC), f"npz, {kind}"


class Rows(torch.utils.data.Dataset[Any]):
    """A data set of (image, label) rows or dicts that states its classes in some way."""

    def __init__(self, rows: list[Any], **stated: Any) -> None:
        self.rows = rows
        vars(self).update(stated)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index % len(self.rows)]


def data_sets(truth: Truth, _folder: Path) -> tuple[Any, str]:
    """A data set, loader or dict whose labels count its own classes, in another order."""
    draw = truth.random
    images, labels = truth.arrays()
    order = list(range(truth.classes))  # the data's label of each class
    named = draw.choice(("folders", "classes", "features", "texts", "nothing"))
    if named == "folders":
        rank = sorted(truth.names)
        order = [rank.index(name) for name in truth.names]
    elif named in ("classes", "features"):
        draw.shuffle(order)
    own = np.array(order)[labels]
    names = [truth.names[order.index(i)] for i in range(truth.classes)]
    stated: dict[str, Any] = {}
    if named == "folders":
        stated = {"classes": names, "class_to_idx": {n: i for i, n in enumerate(names)}}
        stated["samples"] = []
    elif named == "classes":
        # as the author of such a data set defines them; the model was trained on these numbers
        # where its names are not known
        if not truth.known:
            own, names = labels, truth.names
        stated = {"classes": names}
    elif named == "features":
        label = type("ClassLabel", (), {"names": names})()
        if not truth.known:
            own, label.names = labels, truth.names
        stated = {"features": {"image": None, "label": label}}
    form = draw.choice(("rows", "dicts", "pictures", "loader", "columns", "dict loader"))
    answers: list[Any] = [truth.names[c] for c in labels] if named == "texts" else own.tolist()
    tensors = list(SPEC.normalise(torch.from_numpy(images)))
    if form == "pictures":
        shown = [Image.fromarray(image.transpose(1, 2, 0)) for image in images]
        return Rows(list(zip(shown, answers, strict=True)), **stated), f"{named}, {form}"
    if form == "columns" and named in ("texts", "nothing"):  # such a dict can't state its classes
        return {"pixel_values": torch.stack(tensors), "labels": answers}, f"{named}, {form}"
    keys = draw.choice((("pixel_values", "labels"), ("image", "label"), ("img", "label")))
    pairs = list(zip(tensors, answers, strict=True))
    dicts = [dict(zip(keys, pair, strict=True)) for pair in pairs]
    data = Rows(dicts if form in ("dicts", "dict loader") else pairs, **stated)
    if "loader" in form:
        return torch.utils.data.DataLoader(data, batch_size=7), f"{named}, {form}"
    return data, f"{named}, {form}"


def is_clear(kind: str, truth: Truth) -> bool:
    """Whether a case leaves nothing open, so that it must not be refused."""
    if not kind:  # refused while it was read
        return False
    source, style, *change = kind.split(", ")
    if source == "folders" and change:
        spellings = {"number", "padded"}
        if truth.known:
            spellings |= {"name", "case", "underscore", "mixed", "numbered"}
        quiet = {"plain", "missing", "empty", "hidden", "nested", "beside"}
        return style in spellings and change[0] in quiet
    if source == "npz":
        clear = {"plain", "channels last", "column", "float images", "test part", "upper case"}
        return style in clear or (style == "names" and bool(truth.known))
    return bool(truth.known) or source in ("classes", "features", "nothing")


def run_case(seed: int, folder: Path) -> tuple[str, str]:
    """Runs one case; returns its kind and "right", "refused", "warned" or what went wrong."""
    truth = Truth.draw(seed)
    kind, data = "", None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            make = truth.random.choice((folders, folders, npz, data_sets))
            model, names = truth.model(), truth.class_names(folder)
            data, kind = make(truth, folder)
            wanted: Any = truth.forget
            labels = names if names is not None else known_labels(model)
            if labels is not None and truth.random.random() < 0.5:
                texts = ",".join(truth.names[c] for c in truth.forget)
                known = labels if isinstance(labels, Labels) else None
                wanted = parse_classes(texts, known)
            result = evaluate(model, data, wanted, class_names=folder_order(names, data))
        except ZsuFastError as error:
            word = "needlessly refused" if is_clear(kind, truth) else "refused"
            return kind or make.__name__, f"{word}: {type(error).__name__} {str(error)[:200]}"
        except Exception:  # noqa: BLE001  the point of the fuzz
            return kind or make.__name__, traceback.format_exc(limit=-3)
    found, expected = (result.forget_accuracy, result.retain_accuracy), truth.expected()
    if all(a == b or (a and b and abs(a - b) < 1e-9) for a, b in zip(found, expected, strict=True)):
        return kind, "right"
    if any("another numbering" in str(w.message) for w in caught):
        return kind, "warned"
    return kind, f"wrong: seed {seed}, {found} instead of {expected}, names {truth.known!r}"


def fuzz(cases: int, seed: int = 0) -> tuple[Counter[str], list[str]]:
    """Runs the cases; returns the number of each outcome by kind, and what went wrong."""
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as root:
        for number in range(cases):
            place = Path(root) / str(number)
            place.mkdir()
            kind, outcome = run_case(seed + number, place / "data")
            word = outcome.split(":")[0]
            if word not in ("right", "refused", "warned"):
                wrong.append(f"{kind}: {outcome}")
                word = "wrong"
            outcomes[f"{kind.partition(',')[0]}: {word}"] += 1
            outcomes[word] += 1
    return outcomes, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    started = time.perf_counter()
    outcomes, wrong = fuzz(given.cases, given.seed)
    lines = [f"{key}: {count}" for key, count in sorted(outcomes.items())]
    text = (
        f"# Fuzz of labelled data\n\n`python -m benchmarks.stress.fuzz_data --cases {given.cases} "
        f"--seed {given.seed}`, {time.perf_counter() - started:.0f} s\n\n"
        + "\n".join(f"- {line}" for line in lines)
        + "\n\nright: the known FA and RA. refused: an error of the package. warned: the labels "
        "look like those of another numbering. wrong: anything else.\n"
    )
    print(text, *wrong[:20], sep="\n")
    (RESULTS / "fuzz_data.md").write_text(text)
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
