"""The house holds: rooms import only rooms below them, importing is light, public names are documented."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import twofour

ROOT = Path(twofour.__file__).parent

TOWER = [
    "errors",
    "pattern",
    "report",
    "native",
    "masks",
    "solvers",
    "format",
    "kernels",
    "nn",
    "training",
    "workflows",
    "interop",
    "demo",
    "cli",
    "testing",
]
"""From the ground up. `training`, `workflows` and `interop` know nothing of each other; `testing` may look at everything."""

SIDE_BY_SIDE = {room: {"training", "workflows", "interop"} - {room} for room in ("training", "workflows", "interop")}

TRAINING: dict[str, set[str]] = {
    "masks": set(),
    "distillation": set(),
    "activations": set(),
    "companions": {"masks"},
    "runs": {"masks", "distillation"},
}
"""The rooms of `training`, from the ground up, and what each may know of the others."""


def _room(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return relative.parts[0].removesuffix(".py")


def _imports(path: Path) -> list[tuple[str, ...]]:
    """The full names of what a file imports of twofour."""
    package = ("twofour", *path.relative_to(ROOT).parent.parts)
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = (*base, *(node.module or "").split(".")) if node.module else base
            names += [(*module, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [tuple(alias.name.split(".")) for alias in node.names]
    return [name for name in names if name[0] == "twofour"]


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_only_go_down_the_tower(path: Path) -> None:
    room = _room(path)
    if room in ("__init__", "__main__"):
        return
    assert room in TOWER, f"{room} has no floor in the tower: put it into TOWER, and into CONTRIBUTING.md"
    below = set(TOWER[: TOWER.index(room) + 1]) - SIDE_BY_SIDE.get(room, set())
    assert {name[1] for name in _imports(path) if len(name) > 1 and name[1] in TOWER} <= below


@pytest.mark.parametrize("path", sorted(ROOT.glob("training/*/*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_only_go_down_within_training(path: Path) -> None:
    room = path.parent.name
    assert room in TRAINING, f"{room} has no floor in training: put it into TRAINING, and into CONTRIBUTING.md"
    inside = {name[2:3] for name in _imports(path) if name[1:2] == ("training",)}  # () is training itself
    assert inside <= {(other,) for other in {room} | TRAINING[room]}


def test_importing_twofour_starts_no_cuda_and_no_heavy_library() -> None:
    code = (
        "import sys, twofour, torch;"
        "heavy = {'transformers', 'sentence_transformers', 'altair', 'vl_convert', 'onnx', 'lightning', 'hypothesis'};"
        "assert not torch.cuda.is_initialized();"
        "print(sorted(heavy & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


PUBLIC = sorted(name for name in vars(twofour) if not name.startswith("_") and name not in ("annotations",))


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_say_what_they_are(name: str) -> None:
    documentation = inspect.getdoc(getattr(twofour, name))
    assert documentation
    assert len(documentation) > 20


def test_the_verbs_are_there() -> None:
    verbs = {"permute", "prune", "check", "compress", "fuse", "unfuse", "explain", "measure", "save", "load"}
    assert verbs <= set(PUBLIC)
