"""The order of the rooms: imports point up the list of docs/architecture.md only."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import vitrim

PACKAGE = Path(vitrim.__file__).parent

ORDER = (
    "errors",
    "lazy",
    "foreign",
    "recipes",
    "processes",
    "files",
    "progress",
    "codec",
    "spec",
    "counting",
    "budget",
    "freezing",
    "space",
    "allocation",
    "config",
    "architectures",
    "tokens",
    "stems",
    "model",
    "surgery",
    "closed_form",
    "card",
    "checkpoints",
    "artifact",
    "result",
    "hub",
    "data",
    "sources",
    "tasks",
    "training",
    "search",
    "methods",
    "timing",
    "reporting",
    "pipeline",
    "doctor",
    "cli",
    "__main__",
)
"""From the foundations to the command; a room may import those before it, and itself."""

RUNTIME = ("errors", "foreign", "processes", "files", "codec", "spec", "tokens", "stems", "model", "card", "artifact")
TORCHLESS = (
    "errors",
    "lazy",
    "foreign",
    "processes",
    "files",
    "progress",
    "codec",
    "spec",
    "counting",
    "budget",
    "freezing",
    "architectures",
)
NO_TORCH_AT_THE_TOP = ("cli", "doctor")


LIGHT = (
    "config",
    "training",
    "training.config",
    "methods",
    "methods.method",
    *(f"methods.{name}" for name in ("auto", "comcat", "dcvit", "uvc")),
)
"""Packages and configs that are read without torch."""


def room_of(path: Path) -> str:
    """The room that a file belongs to: `errors`, `sources`, ..."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def files() -> list[Path]:
    """Every module but the package's own, which only says where the public names live."""
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py" and not moved(path))


def moved(path: Path) -> bool:
    """Whether a module is only the former name of another."""
    return path.read_text(encoding="utf-8").startswith('"""Moved to `')


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def imports(path: Path, *, top_only: bool = False) -> Iterator[str]:
    """Dotted names of the modules that a file imports, relative ones made absolute; `from a import b` gives a and a.b."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = ("vitrim", *path.relative_to(PACKAGE).parent.parts)
    nodes = tree.body if top_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *((node.module,) if node.module else ())])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def rooms_imported(path: Path) -> set[str]:
    """Rooms of this package that a file imports."""
    found = set()
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "vitrim" and len(parts) > 1 and parts[1] in ORDER:
            found.add(parts[1])
    return found


def outside(path: Path, *, top_only: bool = False) -> set[str]:
    """Distributions that a file imports, beside the standard library and this package."""
    names = {name.split(".")[0] for name in imports(path, top_only=top_only)}
    return {name for name in names if name != "vitrim" and name not in sys.stdlib_module_names}


@pytest.mark.parametrize("path", files(), ids=name_of)
def test_imports_point_up_the_list_only(path: Path) -> None:
    room = room_of(path)
    assert room in ORDER, f"{room} has no place in the order"
    allowed = set(ORDER[: ORDER.index(room) + 1])
    assert rooms_imported(path) <= allowed


def test_no_room_shares_a_public_functions_name() -> None:
    rooms = {room_of(path) for path in files()} | {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    assert not rooms & set(vitrim.__all__)


def test_every_public_name_can_be_reached_and_is_listed() -> None:
    for name in vitrim.__all__:
        assert getattr(vitrim, name) is not None
    assert set(vitrim.__all__) <= set(dir(vitrim))


@pytest.mark.parametrize("path", [p for p in files() if room_of(p) in RUNTIME], ids=name_of)
def test_the_runtime_needs_torch_and_safetensors_only(path: Path) -> None:
    assert outside(path) <= {"torch", "safetensors"}


@pytest.mark.parametrize("path", [p for p in files() if room_of(p) in TORCHLESS], ids=name_of)
def test_the_foundations_need_the_standard_library_only(path: Path) -> None:
    assert outside(path) == set()


@pytest.mark.parametrize("path", [p for p in files() if room_of(p) in NO_TORCH_AT_THE_TOP], ids=name_of)
def test_the_command_imports_heavy_packages_only_where_they_are_needed(path: Path) -> None:
    assert outside(path, top_only=True) <= {"click"}


METHODS = sorted(path.name for path in (PACKAGE / "methods").iterdir() if (path / "__init__.py").is_file())


@pytest.mark.parametrize("path", [p for p in files() if p.parent.name in METHODS], ids=name_of)
def test_no_method_imports_another(path: Path) -> None:
    others = {name for name in METHODS if name != path.parent.name}
    assert not others & {name.split(".")[2] for name in imports(path) if name.startswith("vitrim.methods.")}


@pytest.mark.parametrize("path", [p for p in files() if room_of(p) != "cli"], ids=name_of)
def test_only_the_command_prints_or_exits(path: Path) -> None:
    calls = [node.func for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    names = {ast.unparse(call) for call in calls}
    assert not names & {"print", "exit", "quit", "sys.exit", "click.echo", "sys.stdout.write", "sys.stderr.write"}


@pytest.mark.parametrize("path", [p for p in sorted(PACKAGE.rglob("*.py")) if moved(p)], ids=name_of)
def test_a_former_name_leads_to_the_module_that_moved(path: Path) -> None:
    old = ".".join(("vitrim", *path.relative_to(PACKAGE).with_suffix("").parts))
    new = path.read_text(encoding="utf-8").split("`")[1]
    module, names = import_module(old), vars(import_module(new))
    public = names.get("__all__") or [name for name in names if not name.startswith("_")]
    assert all(getattr(module, name) is names[name] for name in public)


@pytest.mark.parametrize("name", LIGHT)
def test_configs_and_records_are_read_without_torch(name: str) -> None:
    code = f"import sys, vitrim.{name}; print({{'torch', 'timm', 'accelerate', 'numpy'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("word", ["utils", "helpers", "common"])
def test_no_room_is_a_drawer(word: str) -> None:
    assert not list(PACKAGE.rglob(f"{word}.py"))


FOREIGN = ("_shared_state", "_dynamo", "_orig_mod", "_replace", "_asdict", "_fields", "_original_forward")
"""Private names of other libraries that have no public ones, and those of named tuples."""


@pytest.mark.parametrize("path", files(), ids=name_of)
def test_no_module_reaches_for_a_private_name_of_another(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    own |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    reached = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
    }
    taken = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    private = {name for name in reached - own | taken if name.startswith("_") and not name.startswith("__")}
    assert not private - set(FOREIGN)


@pytest.mark.parametrize("path", [p for p in files() if room_of(p) not in ("sources", "cli")], ids=name_of)
def test_a_block_and_its_parts_have_types(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.findall(r"\b(?:block|attention|mlp|tb|sb): Any\b", text)


TESTS = Path(__file__).parent
ACROSS = {
    "golden",
    "fuzz",
    "test_laws",
    "test_layout",
    "test_readme",
    "test_bad_input",
    "test_adding_a_method",
    "test_adding_a_source",
}
"""What stands across rooms; everything else lies where the package has what it tests."""


@pytest.mark.parametrize("path", sorted(TESTS.rglob("test_*.py")), ids=lambda path: path.relative_to(TESTS).as_posix())
def test_tests_lie_where_the_package_has_what_they_test(path: Path) -> None:
    inside = path.relative_to(TESTS)
    assert (PACKAGE / inside.parent).is_dir() or ACROSS & {*inside.parts}
    if inside.parent == Path() and path.stem not in ACROSS:
        rooms = {each.stem for each in PACKAGE.iterdir()}
        name = path.stem.removeprefix("test_")
        assert any(name == room or name.startswith(f"{room}_") for room in rooms)


def test_every_promise_names_a_test_that_is_there() -> None:
    rows = [
        line for line in (TESTS.parent / "docs" / "reliability.md").read_text().splitlines() if line.startswith("| ")
    ]
    file = ""
    for row in rows[2:]:
        named = re.findall(r"`(tests/[\w/.]*)?(?:::(\w+))?`", row.split("|")[2])
        assert named, row
        for path, test in named:
            file = path or file
            place = TESTS.parent / file
            assert place.exists(), row
            assert not test or f"def {test}(" in place.read_text(encoding="utf-8"), row
