"""README, docs and CONTRIBUTING do what they say: every command and code block is run as written.

Blocks of a page are run in order, in an empty folder; Python blocks share their names. A block that
can't be run has ``<!-- not run: REASON -->`` on a line before it; its commands are still checked
against the program's options. A ``text`` block after ``<!-- output -->`` is compared with what the
block before it printed, numbers aside.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
from typer.testing import CliRunner

import zsu_fast
from zsu_fast.cli.app import app
from zsu_fast.evaluation.audit import CheckName, EncoderCheckName, FindingName
from zsu_fast.provenance.record import Record

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
SHELL = ("bash", "sh")
NOT_CODE = ("text", "json", "toml", "cpp", "cuda", "diff")  # shown, nothing to run
_NUMBER = re.compile(r"\d+(\.\d+)?")
_OPTION = re.compile(r"--[a-z][a-z-]*")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, the line it starts at, and the marks before it."""

    language: str
    text: str
    line: int
    reason: str | None = None  # why it is not run
    is_output: bool = False  # what the block before it prints


def blocks(page: str) -> Iterator[Block]:
    """The fenced blocks of a page. Directives of MyST (``{name}``) are not code."""
    reason, is_output = None, False
    lines = iter(enumerate(page.splitlines(), 1))
    for number, line in lines:
        if mark := re.fullmatch(r"<!-- not run: *(.*?) *-->", line):
            reason = mark[1]
            assert len(reason.split()) >= 3, f"line {number}: say why the block is not run"
        elif line == "<!-- output -->":
            is_output = True
        elif fence := re.fullmatch(r"(`{3,})(\S*).*", line):
            body = []
            for _, inner in lines:
                if inner == fence[1]:
                    break
                body.append(inner)
            if not fence[2].startswith("{"):
                yield Block(fence[2], "\n".join(body) + "\n", number + 1, reason, is_output)
            reason, is_output = None, False
        elif line and not line.startswith("<!--"):
            assert reason is None, f"line {number}: a mark without a block after it"
            assert not is_output, f"line {number}: a mark without a block after it"


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """Each command of a shell block: its text and its words."""
    for line in text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield line, words


def run_command(line: str, words: list[str]) -> str:
    """Runs a command in the current folder; zsu-fast in this process, the rest by bash."""
    if words[0] == "zsu-fast":
        result = CliRunner().invoke(app, words[1:])
        assert result.exit_code == 0, f"{line}\n{result.output}"
        return result.stdout
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", line],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def check_command(line: str, words: list[str]) -> None:
    """Checks a command that is not run: its options, its module, the files it names."""
    words = [word for word in words if "=" not in word.partition(" ")[0] or word.startswith("-")]
    if words[0] == "torchrun" and "zsu_fast" in words:
        words = ["zsu-fast", *words[words.index("zsu_fast") + 1 :]]
    if words[0] == "zsu-fast":
        result = CliRunner().invoke(app, [*words[1:], "--help"])
        assert result.exit_code == 0, f"{line}\n{result.output}"
    if words[:2] == ["python", "-m"]:
        source = ROOT.joinpath(*words[2].split(".")).with_suffix(".py")
        assert source.is_file(), f"{line}: there is no {source.relative_to(ROOT)}"
        for option in _OPTION.findall(line):
            assert f'"{option}"' in source.read_text(), f"{line}: {option} is no option of it"
    for word in words:
        if re.fullmatch(r"(benchmarks|tests|examples|docs)/\S+", word) and "_build" not in word:
            assert (ROOT / word).exists(), f"{line}: there is no {word}"


def run_page(page: str, name: str = "page") -> None:
    """Runs a page's blocks in the current folder."""
    namespace: dict[str, object] = {"__name__": name}
    printed = ""
    for block in blocks(page):
        where = f"{name}, line {block.line}"
        if block.is_output:
            assert _NUMBER.sub("#", printed.strip()) == _NUMBER.sub("#", block.text.strip()), where
        elif block.language in SHELL:
            act = run_command if block.reason is None else check_command
            printed = "".join(act(*command) or "" for command in commands(block.text))
        elif block.language == "python":
            code = compile("\n" * (block.line - 1) + block.text, name, "exec")
            if block.reason is None:
                with contextlib.redirect_stdout(io.StringIO()) as output:
                    exec(code, namespace)
                printed = output.getvalue()
        else:
            assert block.language in NOT_CODE, f"{where}: name its language, or one of {NOT_CODE}"


# the other page is run by test_the_file_formats_page_has_every_field
@pytest.mark.parametrize(
    "path", [p for p in PAGES if p.name != "file_formats.md"], ids=lambda path: path.name
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # what a run warns of: only outputs forget, ...
def test_blocks_of(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_page(path.read_text(), path.name)


@pytest.mark.parametrize(
    "page",
    [
        "```bash\nzsu-fast unlearn lenet5 --forget 1-4 --colour blue --out o.safetensors\n```",
        "```bash\nzsu-fast evaluate lenet5 --forget 1 --data no-such-folder\n```",
        "```bash\npython -m no_such_module\n```",
        "<!-- not run: it needs a GPU -->\n```bash\nzsu-fast unlearn lenet5 --colour blue\n```",
        "<!-- not run: it needs ranks -->\n```bash\ntorchrun -m zsu_fast unlearn --colour\n```",
        "<!-- not run: it takes hours -->\n```bash\npython -m benchmarks.harness --fast\n```",
        "<!-- not run: it takes hours -->\n```bash\npytest benchmarks/no_such_file.py\n```",
        "<!-- not run: -->\n```bash\nzsu-fast doctor\n```",
        "<!-- not run: it has no block -->\ntext\n",
        "```python\nassert False\n```",
        "<!-- not run: it needs a GPU -->\n```python\nthis is no Python\n```",
        "```python\nprint('FA 1')\n```\n<!-- output -->\n```text\nRA 1\n```",
        "```brainfuck\n+\n```",
    ],
)
def test_a_broken_block_fails(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((AssertionError, SyntaxError)):
        run_page(page)


def test_links_to_files_of_the_repository() -> None:
    for path in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_paths_named_in_the_documentation_exist() -> None:
    for path in PAGES:
        text = path.read_text()
        folders = "zsu_fast|csrc|tests|benchmarks|examples|docs"
        for name in re.findall(rf"`((?:{folders})/[\w./-]+)[`: ]", text):
            assert (ROOT / name).exists(), f"{path.name}: there is no {name}"


def test_the_changelog_names_modules_that_exist() -> None:
    page = (ROOT / "CHANGELOG.md").read_text()
    for _, now in table_rows(page, "### Modules"):
        room = ""
        for name in re.findall(r"`([a-z_.]+)`", now):
            module = room + name if name.startswith(".") else name
            room = module.rpartition(".")[0]
            path = ROOT / "zsu_fast" / module.replace(".", "/")
            assert path.with_suffix(".py").is_file() or path.is_dir(), f"no zsu_fast.{module}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def table_rows(page: str, heading: str) -> list[list[str]]:
    """The cells of all table rows between a heading and the next one of its level."""
    level = heading.partition(" ")[0]
    text = page.partition(f"\n{heading}\n")[2].partition(f"\n{level} ")[0]
    assert text, f"there is no {heading!r}"
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]


def test_the_options_page_has_every_option_with_its_default() -> None:
    page = (ROOT / "docs" / "options.md").read_text()
    listed = {}
    for heading in ("## Everyday options", "## Expert options"):
        for names, default, *_ in table_rows(page, heading):
            for name in re.findall(r"`(\w+)`", names):
                assert name not in listed, f"{name} is there twice"
                listed[name] = default
    parameters = inspect.signature(zsu_fast.ZeroShotUnlearner).parameters.values()
    wanted = {p.name: f"`{p.default!r}`" for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert listed == wanted


def test_the_api_page_has_every_public_name() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    assert set(re.findall(r":: zsu_fast\.(\w+)$", page, re.M)) == set(zsu_fast.__all__)


def test_the_design_page_has_the_layers_of_the_import_contract() -> None:
    contract = (ROOT / "pyproject.toml").read_text().partition("[tool.importlinter]")[2]
    page = (ROOT / "docs" / "design.md").read_text().partition("<!-- layers -->\n```text\n")[2]
    layers = re.findall(r'^ {4}"(.+)",$', contract, re.M)
    assert layers == page.partition("\n```")[0].splitlines()


def test_the_evidence_page_has_every_check_and_finding() -> None:
    page = (ROOT / "docs" / "evidence.md").read_text()
    for heading, names in (
        ("## The fourteen tests", CheckName),
        ("## What the audit recognises", FindingName),
    ):
        section = page.partition(f"\n{heading}\n")[2].partition("\n## ")[0]
        listed = [line.split(" | ")[0].strip("| ") for line in section.splitlines() if "|" in line]
        wanted = [value for name, value in vars(names).items() if name.isupper()]
        assert sorted(listed[2:]) == sorted(wanted)


def test_the_page_on_encoders_has_every_test_of_theirs() -> None:
    page = (ROOT / "docs" / "encoders.md").read_text()
    section = page.partition("\n| test | passes when |\n")[2].partition("\n\n")[0]
    listed = [line.split(" | ")[0].strip("| ") for line in section.splitlines()[1:]]
    wanted = [value for name, value in vars(EncoderCheckName).items() if name.isupper()]
    assert listed == [*wanted, f"{CheckName.PROBE}, {CheckName.RELEARN_FULL}"]


def test_the_results_page_names_every_file() -> None:
    page = (ROOT / "docs" / "results.md").read_text()
    for path in (ROOT / "benchmarks" / "results").glob("*.md"):
        assert f"`{path.name}`" in page or path.name.startswith("cuda_"), path.name


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_file_formats_page_has_every_field(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "file_formats.md").read_text()
    run_page(page)
    from safetensors import safe_open

    formats = []
    for name, heading in (("impressions", "## Impressions"), ("delta", "## Delta")):
        section = page.partition(f"\n{heading}\n")[2].partition("\n## ")[0]
        with safe_open(f"{name}.safetensors", "pt") as file:
            metadata = file.metadata()
            names = [*metadata, *(file.keys() if name == "impressions" else ())]
        formats.append(metadata["format"])
        assert [key for key in names if f"| `{key}` |" not in section] == []
    entry = json.loads(Path("ledger.jsonl").read_text())
    formats.append(entry["format"])
    listed = [n for row in table_rows(page, "## Ledger") for n in re.findall(r"`(\w+)`", row[0])]
    assert listed == list(entry)
    assert [key for key in entry["metrics"] if f"`{key}`" not in page] == []
    assert [name for name in formats if f"`{name}`" not in page] == []
    listed = [n for row in table_rows(page, "## Record") for n in re.findall(r"`(\w+)`", row[0])]
    assert sorted(listed) == sorted(f.name for f in fields(Record) if f.name != "_clock")
