"""The hourglass of docs/architecture.md: imports point one way, from both sides to the waist.

Read from the source with `ast`, so that an import inside a function counts too.
"""

import ast
from pathlib import Path

import pytest

import logalign

SOURCE = Path(logalign.__file__).parent
FRAMEWORKS = {"torch", "jax", "jaxlib", "tensorflow", "keras", "flax", "transformers", "lightning", "accelerate"}

PARTS = {
    "ground": ["errors", "common"],
    "mathematics": ["mathematics"],
    "waist": ["runs", "samples"],
    "producers": ["torch", "jax", "checkpoints"],
    "consumers": ["diagnosis", "trackers", "report", "follow", "notebook"],
    "composition": ["recording", "integrations", "demos", "cli"],
}
MAY_IMPORT = {
    "ground": {"ground"},
    "mathematics": {"ground", "mathematics"},
    # A reading is made of one site's energies.
    "waist": {"ground", "mathematics", "waist"},
    "producers": {"ground", "mathematics", "waist", "producers"},
    # Not the mathematics: what a consumer knows of arrays is the numbers in the readings.
    "consumers": {"ground", "waist", "consumers"},
    "composition": set(PARTS),
}
LOADED_BY_NAME = {("logalign.runs.run", "logalign.notebook")}
"""Who names a module as text and may: `run.plot()` hands itself to a consumer when it is called."""
MAY_IMPORT_FRAMEWORKS = {"producers", "composition"}


def module_name(path: Path) -> str:
    parts = ("logalign", *path.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str | None:
    """The part of the hourglass that a module of logalign belongs to; None for the package itself."""
    names = module.split(".")[1:]
    if not names:
        return None
    found = [part for part, tops in PARTS.items() if names[0] in tops]
    assert found, f"{module} belongs to no part: give it one here and in docs/architecture.md"
    return found[0]


def imports_of(tree: ast.AST, module: str, *, is_package: bool) -> set[str]:
    """Every module that a source file imports, wherever in the file, those for types only included."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".")
                above = above[: len(above) - node.level + is_package]
                base = ".".join([*above, *([node.module] if node.module else [])])
            # `from logalign import x` may name a module or a lazily loaded name: both are looked at.
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names if base.split(".")[0] == "logalign")}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            # A module that is named as text is one that is imported.
            name = node.args[0].value if isinstance(node.args[0], ast.Constant) else ""
            if (module, name) not in LOADED_BY_NAME:
                found.add(name)
    return found


def faults_of(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """What in a source file breaks the rules, in words."""
    part = part_of(module)
    if part is None:
        return []
    faults = []
    for name in sorted(imports_of(ast.parse(source), module, is_package=is_package)):
        top = name.split(".")[0]
        if top in FRAMEWORKS and part not in MAY_IMPORT_FRAMEWORKS:
            faults.append(f"{module} ({part}) imports the framework {top}")
        if top == "logalign":
            target = part_of(resolved(name))
            if target is not None and target not in MAY_IMPORT[part]:
                faults.append(f"{module} ({part}) imports {name} ({target})")
    return faults


def resolved(name: str) -> str:
    """The module behind a dotted name: `logalign.lar` is `logalign.mathematics.energies`; others stay as they are."""
    names = name.split(".")
    if len(names) > 1 and names[1] in logalign._HOME:
        module: str = logalign._HOME[names[1]]
        return module
    return "logalign" if len(names) > 1 and names[1].startswith("__") else name


SOURCES = sorted(SOURCE.rglob("*.py"))


def arrows() -> dict[str, set[str]]:
    """Each module, and the modules of logalign that it imports."""
    names = {module_name(path): path for path in SOURCES}
    found = {}
    for name, path in names.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        wanted = imports_of(tree, name, is_package=path.name == "__init__.py") & set(names)
        # `from logalign.torch import hooks` is of the module, not of its package, too.
        found[name] = {each for each in wanted if not any(other.startswith(f"{each}.") for other in wanted)} - {name}
    return found


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Those that can be reached from themselves, together with the others on their way."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        ahead = [*graph[start]]
        while ahead:
            name = ahead.pop()
            if name not in seen:
                seen.add(name)
                ahead += graph.get(name, ())
        return seen

    reach = {name: reached(name) for name in graph}
    return sorted({tuple(sorted(o for o in reach[n] if n in reach.get(o, ()))) for n in graph if n in reach[n]})


def room_of(module: str) -> str:
    """The room in the package's folder that a module stands in: a package, or a module by itself."""
    return module.split(".")[1] if "." in module else ""


def test_no_module_is_part_of_a_circle():
    assert circles(arrows()) == []
    assert circles({"a": {"b"}, "b": {"a", "c"}, "c": set()}) == [("a", "b")]


def test_no_room_is_part_of_a_circle():
    rooms: dict[str, set[str]] = {}
    for module, imported in arrows().items():
        if module != "logalign":  # which loads public names when they are used
            rooms.setdefault(room_of(module), set()).update(room_of(each) for each in imported)
    assert circles({room: imported - {room} for room, imported in rooms.items()}) == []


def test_no_module_imports_the_package_itself():
    importers = [
        module_name(path)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.Import) and any(alias.name == "logalign" for alias in node.names))
        or (isinstance(node, ast.ImportFrom) and node.module == "logalign" and not node.level)
    ]
    assert importers == []


@pytest.mark.parametrize("path", SOURCES, ids=[module_name(path) for path in SOURCES])
def test_imports_point_one_way(path):
    assert faults_of(path.read_text(encoding="utf-8"), module_name(path), is_package=path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("logalign.runs.reading", "import torch"),
        ("logalign.mathematics.energies", "def f():\n    import torch.nn as nn"),
        ("logalign.report.page", "from logalign.recording.monitor import Monitor"),
        ("logalign.report.page", "from ..recording.monitor import Monitor"),
        ("logalign.report.page", "from logalign import watch"),
        ("logalign.diagnosis.robust", "if TYPE_CHECKING:\n    from jax import Array"),
        ("logalign.torch.hooks", "from logalign.recording.monitor import Monitor"),
        ("logalign.torch.hooks", "from logalign.report import page"),
        ("logalign.report.figures", "from logalign.mathematics.energies import Energies"),
        ("logalign.runs.run", "from logalign.torch import sites"),
        ("logalign.runs.run", "from logalign import notebook"),
        ("logalign.runs.run", "import_module('logalign.report.figures')"),
        ("logalign.runs.reading", "importlib.import_module('logalign.notebook')"),
    ],
)
def test_the_check_sees_a_wrong_import(module, source):
    assert len(set(faults_of(source, module))) >= 1


def test_the_check_allows_what_is_right():
    assert faults_of("import torch\nfrom logalign import Energies, __version__", "logalign.torch.hooks") == []
    assert faults_of("from logalign.torch import hooks\nfrom . import readings", "logalign.recording.monitor") == []
    assert faults_of("from .figures import lar_figure", "logalign.report.page") == []
