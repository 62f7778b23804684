"""The house itself: one-way imports between rooms, light commands, and nothing in the repository that should not be."""

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


ROOMS = (  # in the order in which data flows: each imports only from itself and from those before it
    "errors", "recipe", "kernels", "huggingface", "models", "display", "data", "training", "circuits", "graph", "nodes",
    "evidence", "verdicts", "explanations", "studies", "cards", "steering", "finetunes", "api", "server", "cli",
)  # fmt: skip
MOST_FILES_AT_TOP, MOST_LINES = 5, 450


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


def room_of(module: str) -> str:
    """The room of a module's path within the package; of a module at the top its own name."""
    return module.removesuffix(".py").partition("/")[0]


def test_every_module_is_in_a_room_and_every_room_says_what_it_is() -> None:
    assert {room_of(module) for module in MODULES} - {"__init__"} == set(ROOMS)
    for room in ROOMS:
        if (PACKAGE / room).is_dir():
            assert ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8"))), room
    assert len(list(PACKAGE.glob("*.py"))) <= MOST_FILES_AT_TOP


@pytest.mark.parametrize("module", [module for module in MODULES if module != "__init__.py"])
def test_a_module_imports_only_from_its_room_and_those_before_it(module: str) -> None:
    before = ROOMS[: ROOMS.index(room_of(module)) + 1]
    for other in imported(PACKAGE / module):
        assert other, f"bridge/{module} imports a package as a whole; import from the module that has it"
        assert room_of(other) in before, f"bridge/{module} imports bridge/{other}, whose room comes later"


def test_within_a_room_nobody_imports_in_a_circle() -> None:
    waiting = {module: set(imported(PACKAGE / module)) - {module} for module in MODULES if module != "__init__.py"}
    while waiting:
        free = [module for module, needs in waiting.items() if not needs & waiting.keys()]
        assert free, f"these import one another in a circle: {sorted(waiting)}"
        for module in free:
            del waiting[module]


def test_no_module_is_too_long() -> None:
    lengths = {module: len((PACKAGE / module).read_text(encoding="utf-8").splitlines()) for module in MODULES}
    assert {module: n for module, n in lengths.items() if n > MOST_LINES} == {}


def test_no_test_module_imports_another() -> None:
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith(("test_", "conftest")), f"{path.name} imports {node.module}"


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
    assert heavy_after("import bridge.cli.main; bridge.cli.main.app") == ""


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
