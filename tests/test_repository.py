"""The repository holds what it says: files parse, the README's commands exist, and nothing is tied to one machine."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("policies", "envs", "autoscaler", "training")
REQUIRED = (
    *PACKAGES,
    "tests",
    "configs",
    "docs",
    ".ci/run",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "constraints.txt",
    "pyproject.toml",
)


def repository_files() -> list[Path]:
    """Files that are tracked, or would be with the next `git add`: what a user who clones the repository gets."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    )
    return [path for name in listing.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def text_files() -> Iterator[tuple[str, str]]:
    """Pairs (path from the root, text) of the repository's text files; files with a zero byte are binary."""
    for path in repository_files():
        raw = path.read_bytes()
        if b"\0" not in raw:
            yield path.relative_to(ROOT).as_posix(), raw.decode("utf-8", errors="replace")


def hits(pattern: re.Pattern[str], files: Iterator[tuple[str, str]]) -> list[str]:
    """Every line that holds the pattern, as `file:line: text`."""
    return [
        f"{name}:{number}: {line.strip()}"
        for name, text in files
        for number, line in enumerate(text.splitlines(), start=1)
        if pattern.search(line)
    ]


def readme_commands(text: str) -> list[str]:
    """The command lines of the fenced code blocks, without prompts, comments, or the breaks of continued lines.

    Blocks marked as a language other than a shell's are left out.
    """
    commands: list[str] = []
    for block in re.finditer(r"^```([\w-]*)[^\n]*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        if block[1] in {"", "sh", "bash", "shell", "console"}:
            lines = block[2].replace("\\\n", " ").splitlines()
            commands += [line.removeprefix("$ ").split(" #")[0].strip() for line in lines]
    return [command for command in commands if command and not command.startswith("#")]


def make_targets_named(text: str) -> set[str]:
    """Targets of the `make` calls in code blocks and in inline code; options and assignments are no targets."""
    spans = [*readme_commands(text), *re.findall(r"`(make [^`\n]+)`", text)]
    words: set[str] = set()
    for span in spans:
        for call in re.findall(r"(?:^|&&|;|\s)\s*make((?:\s+[^\s&|;]+)+)", span):
            bare = re.sub(r"'[^']*'|\"[^\"]*\"", "", call)
            words |= {word for word in bare.split() if re.fullmatch(r"[a-z][\w-]*", word)}
    return words


def jevons_subcommands_named(text: str) -> set[tuple[str, ...]]:
    """The leading plain words of every `jevons` call in a code block, for example ("demo",)."""
    found = set()
    for command in readme_commands(text):
        for call in re.findall(r"(?:^|&&|;|\s|/)jevons((?:\s+[a-z][a-z-]*(?=\s|$))+)", command):
            found.add(tuple(call.split()))
    return found


def makefile_targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z][\w-]*):(?!=)", makefile, flags=re.MULTILINE))


@pytest.mark.parametrize("entry", REQUIRED)
def test_required_entry_exists(entry: str) -> None:
    assert (ROOT / entry).exists()


def test_licence_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_every_yaml_file_parses() -> None:
    broken = {}
    for path in repository_files():
        # Helm's templates become YAML only when they are rendered.
        if path.suffix in {".yaml", ".yml"} and "templates" not in path.parts:
            try:
                list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
            except yaml.YAMLError as error:
                broken[path.relative_to(ROOT).as_posix()] = str(error)
    assert broken == {}


def test_no_file_names_a_folder_of_one_machine() -> None:
    homes = "|".join(("root", "home", "Users"))
    # A path begins after a blank, a quote, a bracket, "=", ":" or at the start of the line; URLs and `a/home/b` do not.
    pattern = re.compile(rf"(?:^|[\s\"'`(\[=:,])/(?:{homes})/[\w.-]")
    assert hits(pattern, text_files()) == []


def test_product_code_holds_no_unfinished_marks() -> None:
    pattern = re.compile(r"\b(?:TODO|FIXME|XXX)\b")
    product = ((name, text) for name, text in text_files() if name.split("/")[0] in PACKAGES)
    assert hits(pattern, product) == []


def product_folders() -> list[Path]:
    """The packages and the folders in them."""
    return sorted(file.parent for package in PACKAGES for file in (ROOT / package).rglob("__init__.py"))


@pytest.mark.parametrize("folder", product_folders(), ids=lambda folder: folder.relative_to(ROOT).as_posix())
def test_folder_says_what_lives_there_and_exports_nothing(folder: Path) -> None:
    (only,) = ast.parse((folder / "__init__.py").read_text(encoding="utf-8")).body
    assert isinstance(only, ast.Expr)
    assert isinstance(only.value, ast.Constant)
    lives, *rest = str(only.value.value).split("\n\n")
    assert lives.strip()
    if folder.parent != ROOT:
        assert [text for text in rest if text.strip().startswith("Must not know ")] != []


def test_every_folder_of_product_code_is_a_package() -> None:
    folders = {file.parent for package in PACKAGES for file in (ROOT / package).rglob("*.py")}
    assert folders == set(product_folders())


def test_no_file_of_product_code_is_longer_than_400_lines() -> None:
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    lengths = {file.relative_to(ROOT).as_posix(): len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    assert {name: lines for name, lines in lengths.items() if lines > 400} == {}


def test_the_folders_of_tests_mirror_those_of_the_packages() -> None:
    tested = {file.parent.relative_to(ROOT / "tests") for file in (ROOT / "tests").rglob("test_*.py")}
    rooms = {folder.relative_to(ROOT) for folder in product_folders()}
    assert tested - rooms == {Path(), Path("chaos"), Path("fuzz"), Path("integration")}


def test_make_targets_in_the_documentation_exist() -> None:
    named = {
        (name, target)
        for name in ("README.md", "CONTRIBUTING.md")
        for target in make_targets_named((ROOT / name).read_text(encoding="utf-8"))
    }
    targets = makefile_targets()
    assert {(name, target) for name, target in named if target not in targets} == set()


def test_every_make_target_is_listed_by_help() -> None:
    # Run by `make test`, this would be a make inside a make, which prints more.
    environment = {name: value for name, value in os.environ.items() if name not in {"MAKEFLAGS", "MAKELEVEL"}}
    command = ["make", "--no-print-directory", "help"]
    listing = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True, text=True).stdout
    assert {line.split()[0] for line in listing.splitlines()} == makefile_targets()


def headings(page: Path) -> set[str]:
    """The identifiers that Markdown readers give a page's headings."""
    found = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in found}


def test_links_between_pages_lead_somewhere() -> None:
    broken = []
    for page in (path for path in repository_files() if path.suffix == ".md"):
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if "://" in target:
                continue
            name, _, anchor = target.partition("#")
            file = page.parent / name if name else page
            if not file.exists() or (anchor and anchor not in headings(file)):
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert broken == []


def test_the_table_of_faults_is_what_the_tests_declare() -> None:
    page = (ROOT / "docs/live.md").read_text(encoding="utf-8")
    assert importlib.import_module("tests.fault_table").page(page) == page, "run `make fault-table`"


def test_files_that_the_documentation_names_exist() -> None:
    """Paths in inline code that begin with one of the repository's folders."""
    pattern = re.compile(r"`((?:policies|envs|autoscaler|training|tests|configs|docs)/[\w./-]+)`")
    missing = []
    for page in (path for path in repository_files() if path.suffix == ".md" and path.name != "CHANGELOG.md"):
        missing += [
            f"{page.relative_to(ROOT)}: {name}"
            for name in pattern.findall(page.read_text(encoding="utf-8"))
            if not any((ROOT / f"{name}{ending}").exists() for ending in ("", ".py"))
        ]
    assert missing == []


def test_jevons_commands_in_the_readme_exist() -> None:
    named = jevons_subcommands_named((ROOT / "README.md").read_text(encoding="utf-8"))
    typer_main = importlib.import_module("typer.main")
    unknown = set()
    for words in named:
        command = typer_main.get_command(importlib.import_module("training.commands.main").app)
        for word in words:
            subcommands = getattr(command, "commands", None)
            if subcommands is None:  # the words that follow a leaf command are its arguments
                break
            if word not in subcommands:
                unknown.add(" ".join(("jevons", *words)))
                break
            command = subcommands[word]
    assert unknown == set()


def test_readme_parser_reads_blocks_prompts_and_continued_lines() -> None:
    readme = """
Run `make test` or:

```sh
# comment make nothing
$ make demo install PYTHON=python3.12  # see make never
.venv/bin/jevons train \\
    --config x.yaml && jevons policy show a.json
make test ARGS='-k demo' && make check
```

```python
jevons = make("bread")
```
"""
    assert make_targets_named(readme) == {"demo", "install", "test", "check"}
    assert jevons_subcommands_named(readme) == {("train",), ("policy", "show")}


def test_constraints_satisfy_the_declared_dependencies() -> None:
    """Every dependency but PyTorch has exactly one pinned version, which lies in the declared bounds."""
    requirements = importlib.import_module("packaging.requirements")
    names = importlib.import_module("packaging.utils")
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    pinned = {names.canonicalize_name(name): version for name, version in pairs}
    assert len(pinned) == len(pairs)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project.get("optional-dependencies", {})
    wanted = [*project["dependencies"], *(line for extra in extras.values() for line in extra)]
    unmet = []
    for line in wanted:
        requirement = requirements.Requirement(line)
        name = names.canonicalize_name(requirement.name)
        if name != "torch" and not (name in pinned and requirement.specifier.contains(pinned[name])):
            unmet.append(line)
    assert unmet == []


def test_constraints_leave_the_choice_of_pytorch_build_open() -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert re.findall(r"^(?:torch|triton|nvidia-|cuda-).*$", text, flags=re.MULTILINE) == []


def test_a_cpu_pytorch_brings_no_gpu_packages() -> None:
    if not importlib.metadata.version("torch").endswith("+cpu"):
        pytest.skip("this environment holds another build of PyTorch")
    installed = {distribution.name.lower() for distribution in importlib.metadata.distributions()}
    assert {name for name in installed if name.startswith(("nvidia-", "cuda-", "triton"))} == set()
