"""The house itself: one-way imports in the README's order, light commands, and nothing in the repository that should not be."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "bridge"
FILES = PACKAGE.rglob("*.py")
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in FILES if path.parent == PACKAGE or path.stem != "__init__")
LARGEST_FILE = 16 * 2**20


def readme_tree() -> list[str]:
    """The files that the README's annotated tree lists below `bridge/`, in its order, as paths within the package."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    start = next((number for number, line in enumerate(lines) if re.match(r"bridge/(\s|$)", line)), None)
    assert start is not None, "README.md has no tree: a block with a line `bridge/` and the package's files below it"
    names, folder = [], ""
    for line in lines[start + 1 :]:
        if not line.startswith(" "):
            break
        if match := re.match(r"( {2}| {4})(\S+)(\s|$)", line):  # further in: a comment that goes on
            indent, name = match.group(1), match.group(2)
            if len(indent) == 2:
                folder = name if name.endswith("/") else ""
            if not name.endswith("/"):
                names.append(f"{folder}{name}")
    return names


def imported(path: Path) -> Iterator[str]:
    """The modules of the package that a file imports, anywhere in it, TYPE_CHECKING included; '' for the package itself."""

    def file_of(dotted: str) -> str:
        name = f"{dotted.removeprefix('bridge').removeprefix('.').replace('.', '/')}.py"
        return name if name in MODULES else ""

    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "bridge":
                    yield file_of(alias.name)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}, line {node.lineno}: write imports in full, from bridge.module"
            module = node.module or ""
            if module.partition(".")[0] == "bridge":
                whole = file_of(module)
                yield from [whole] if whole else (file_of(f"{module}.{alias.name}") for alias in node.names)


def test_the_readmes_tree_is_the_package() -> None:
    tree = readme_tree()
    assert len(tree) == len(set(tree))
    assert sorted(name for name in tree if name.endswith(".py")) == MODULES
    for name in tree:
        assert (PACKAGE / name).exists(), f"README.md names bridge/{name}, which does not exist"


@pytest.mark.parametrize("module", [module for module in MODULES if module != "__init__.py"])
def test_a_module_imports_only_from_those_above_it(module: str) -> None:
    order = readme_tree()
    assert module in order, f"bridge/{module} is not in the README's tree"
    above = order[: order.index(module)]
    for other in imported(PACKAGE / module):
        assert other, f"bridge/{module} imports the package as a whole; import from the module that has it"
        assert other in above, f"bridge/{module} imports bridge/{other}, which the README's tree lists below it"


def heavy_after(code: str) -> str:
    """Which of the slow libraries are loaded after running some code in a fresh interpreter."""
    heavy = ("torch", "transformers", "numba", "numpy", "datasets", "accelerate", "peft", "scipy", "pyarrow")
    check = f"{code}\nimport sys\nprint(*[name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_the_package_and_its_commands_is_light() -> None:
    assert heavy_after("import bridge") == ""
    assert heavy_after("import bridge.recipe") == ""
    assert heavy_after("import bridge.cli; bridge.cli.app") == ""


def tracked() -> list[Path]:
    """Every file that git has, or that the next `git add .` would give it."""
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def test_no_file_knows_where_it_was_written() -> None:
    """Paths of the machines this was developed on, in source and in saved configurations alike."""
    here = re.compile(rb"(?<![\w.])/(?:work|root)/")
    assert [str(path.relative_to(ROOT)) for path in tracked() if here.search(path.read_bytes())] == []


def test_no_file_is_a_pickle_or_too_large() -> None:
    pickles = {".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".joblib"}
    assert [path.name for path in tracked() if path.suffix in pickles] == []
    assert [path.name for path in tracked() if path.stat().st_size > LARGEST_FILE] == []
