"""The page that says what each file of a room is for names them all, in an order in which each knows those above it."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
#: rooms, and whether the page names all of their files
LISTED = {"deltas": True, "inference": True, "serving": True, "storage": False}


def named(room: str) -> list[str]:
    """Files and folders in the page's order."""
    intro = PAGE.index(f"`{room}`", PAGE.index("Inside a room"))
    lines = PAGE[PAGE.index("```", intro) :].split("```")[1].splitlines()
    return [name.rstrip("/") for line in lines if line for name in re.split(r"\s{2,}|(?<![,:]) ", line)[0].split(", ")]


def known_to(file: Path, room: str) -> set[str]:
    """Files and folders of the room that one imports from, inside functions too."""
    imports = (node for node in ast.walk(ast.parse(file.read_bytes())) if isinstance(node, ast.ImportFrom))
    of_room = [node for node in imports if (node.module or "").split(".")[:2] == ["spectune", room]]
    deeper = {(node.module or "").split(".")[2] for node in of_room if node.module != f"spectune.{room}"}
    return deeper | {name.name for node in of_room if node.module == f"spectune.{room}" for name in node.names}


@pytest.mark.parametrize("room", LISTED)
def test_the_page_of_the_architecture_is_true(room: str) -> None:
    folder, names = ROOT / "src" / "spectune" / room, named(room)
    assert len(names) == len(set(names))
    there = {path.stem for path in folder.glob("*.py") if path.stem != "__init__"}
    assert [name for name in names if name not in there and not (folder / name).is_dir()] == []
    if LISTED[room]:
        assert there - set(names) == set()
    for place, name in enumerate(names):
        files = folder.joinpath(name).rglob("*.py") if name not in there else [folder / f"{name}.py"]
        for file in files:
            assert known_to(file, room) & set(names[place + 1 :]) == set(), f"{name} knows what the page has below it"
