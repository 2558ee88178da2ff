"""How the house is built: which words stand where, and that imports only go down."""

import ast
import re
from pathlib import Path

import svfit_dreambooth

PACKAGE = Path(svfit_dreambooth.__file__).parent
SOURCES = {str(path.relative_to(PACKAGE)): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}

FLOORS = {
    "errors": 0, "files": 0, "folders": 0, "remarks": 0, "threads": 0, "method": 0, "basis": 0,
    "adapter": 1, "bases": 1, "photos": 1,
    "painting": 2, "evaluation": 2,
    "training": 3, "sharing": 3, "peft": 3,
    "subjects": 4,
    "fleet": 5, "commands": 5, "web": 5,
}  # fmt: skip
FOREIGN_FLAG = "commands/arguments.py"  # kohya's --unet_lr, which people may give by habit


def holding(pattern):
    return {name for name, text in SOURCES.items() if re.search(pattern, text, re.IGNORECASE)}


def test_only_the_families_and_other_peoples_formats_know_what_the_denoiser_is():
    """A base with another kind of denoiser is one new file then."""
    found = {name for name in holding("unet") if not name.startswith(("bases/", "sharing/"))}
    assert found <= {FOREIGN_FLAG}


def test_few_files_know_the_embedded_base():
    assert len(holding("toybox")) <= 6, holding("toybox")


def room(module):
    """The first part of "svfit_dreambooth.room.file", or None for what is not a room."""
    parts = module.split(".")
    return parts[1] if parts[0] == "svfit_dreambooth" and len(parts) > 1 else None


def imports(text):
    """The modules that a source imports, but for those that it names only to a type checker."""
    tree = ast.parse(text)
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def climbs():
    found = set()
    for name, text in SOURCES.items():
        own = name.removesuffix(".py").split("/")[0]
        if own not in FLOORS:
            continue  # the package's own door names what lives in every room
        for module in imports(text):
            other = room(module)
            if other in FLOORS and FLOORS[other] > FLOORS[own]:
                found.add((name, module.removeprefix("svfit_dreambooth.")))
    return found


def test_imports_only_go_down():
    assert climbs() == set()


def test_every_room_has_a_floor():
    rooms = {name.split("/")[0].removesuffix(".py") for name in SOURCES} - {"__init__", "__main__"}
    assert rooms <= set(FLOORS), rooms - set(FLOORS)


def test_rooms_of_one_floor_make_no_circle():
    """Rooms may know their neighbours, but not both one another."""
    between = set()
    for name, text in SOURCES.items():
        own = name.split("/")[0].removesuffix(".py")
        between |= {(own, other) for other in map(room, imports(text)) if other in FLOORS and own in FLOORS}
    between = {pair for pair in between if FLOORS[pair[0]] == FLOORS[pair[1]]}
    assert {pair for pair in between if pair[0] < pair[1] and pair[::-1] in between} == set()
