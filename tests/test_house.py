"""Every room's imports point down, and files stay short enough to be read."""

import ast
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
MOST_LINES = 400
# Each room of training/ imports only from rooms on lower floors.
FLOORS = [
    {"runtime"},
    {"data", "losses", "codebook"},
    {"metrics", "loop", "tokenization"},
    {"peers"},
    {"evaluation", "recipes"},
    {"demo", "experiments"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# What each package imports of this project, besides itself.
BELOW = {
    "modeling_simvq": set(),
    "hub_cards": {"modeling_simvq"},
    "training": {"modeling_simvq", "hub_cards"},
}


def sources() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=REPOSITORY, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [Path(name) for name in listed.stdout.split() if (REPOSITORY / name).exists()]


def imported(path: Path) -> set[str]:
    """Dotted names of the modules that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse((REPOSITORY / path).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            # Of `from package import module` the module counts.
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_packages_import_only_what_lies_below():
    wrong = [
        f"{path} imports {name}"
        for path in sources()
        if path.parts[0] in BELOW and "space" not in path.parts
        for name in imported(path)
        for package in [name.split(".")[0]]
        if package in {*BELOW, "tests"} - {path.parts[0]} - BELOW[path.parts[0]]
    ]
    assert not wrong


def test_rooms_import_only_from_lower_floors():
    top = len(FLOORS)
    wrong = []
    for path in sources():
        if path.parts[0] != "training":
            continue
        room = path.parts[1] if len(path.parts) > 2 else ""
        for name in imported(path):
            package, other, *_ = [*name.split("."), ""]
            if package != "training" or other == room:
                continue
            # A command, at the top, imports no other command.
            if FLOOR.get(other, top) >= FLOOR.get(room, top):
                wrong.append(f"{path} imports {name}")
    assert not wrong


@pytest.mark.slow
def test_no_circle():
    """Of files: what a file imports does not import it again, in any number of steps."""
    modules = {".".join(path.with_suffix("").parts): path for path in sources()}
    imports = {
        module: {
            other
            for name in imported(path) | neighbours(path)
            for other in (name, name.rpartition(".")[0])
            if other in modules and other != module
        }
        for module, path in modules.items()
        if path.parts[0] in BELOW and "space" not in path.parts
    }
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way, module))
        if module not in done:
            for other in imports.get(module, ()):
                visit(other, (*way, module))
            done.add(module)

    for module in imports:
        visit(module, ())


def neighbours(path: Path) -> set[str]:
    """Return dotted names of what a file imports from its own package, relatively."""
    package = ".".join(path.parts[:-1])
    return {
        f"{package}.{node.module}"
        for node in ast.walk(ast.parse((REPOSITORY / path).read_text()))
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module
    }


def test_the_top_of_training_holds_commands_and_rooms():
    training = REPOSITORY / "training"
    for path in sources():
        if path.parts[0] == "training" and len(path.parts) == 2 and path.name != "__init__.py":
            assert '__name__ == "__main__"' in (REPOSITORY / path).read_text(), path
    rooms = {path.parts[1] for path in sources() if path.parts[0] == "training" and path.parts[2:]}
    assert rooms == set(FLOOR)
    assert (training / "configs").is_dir()


def test_files_stay_short():
    long = {
        str(path): lines
        for path in sources()
        if (lines := len((REPOSITORY / path).read_text().splitlines())) > MOST_LINES
        # The models' files are one file each, as transformers' are.
        and path.parts[0] in ("training", "hub_cards", "benchmarks")
    }
    assert not long


def test_docstrings_begin_with_a_verb_or_a_thing():
    """Not with "What", "How", "Where", "Of" or "As": such a sentence has to be read twice."""
    wrong = [
        f"{path}:{getattr(node, 'lineno', 1)}: {text.splitlines()[0]}"
        for path in sources()
        if path.parts[0] in (*BELOW, "benchmarks")
        for node in ast.walk(ast.parse((REPOSITORY / path).read_text()))
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        for text in [ast.get_docstring(node) or ""]
        if text.split(" ")[0] in ("What", "How", "Where", "Whether", "Of", "As", "For", "Which")
    ]
    assert not wrong
