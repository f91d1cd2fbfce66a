"""Who imports whom: data flows one way, so no module needs one that needs it."""

import ast
import re
import sys
from graphlib import TopologicalSorter
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src"
MODULES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (SOURCE / "t3d").rglob("*.py")
}


def imports(name: str) -> set[str]:
    """The modules of t3d that a module imports, at its top or inside of functions; types alone do not count."""
    tree = ast.parse(MODULES[name].read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", None) == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {part if part in MODULES else node.module for part in parts}
    return found & MODULES.keys()


def test_no_circles():
    graph = {name: imports(name) for name in MODULES}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError, which names one
    assert len(order) == len(MODULES)


LAYERS = [
    *("errors", "blocks", "components", "typed", "disk", "log", "embedded", "recipes", "block_attention"),
    *("chat_template", "decoding", "trajectories", "models", "engine", "tasks", "answers", "distill", "evaluation"),
    *("report", "config", "pipeline", "study", "calibrate", "generate", "plan", "hub", "serve", "cli", "__main__"),
]
CLIMBS = {  # what a lower layer takes from a higher one all the same
    ("t3d.trajectories.upstream", "t3d.tasks.records"),  # files are read as a task's are
}


def test_layers():
    """From the ground up: what is in a layer imports its own and those before it in the list."""

    def layer(name: str) -> int:
        return LAYERS.index(name.split(".")[1]) if "." in name else -1  # t3d itself has the version alone

    climbs = {(name, other) for name in MODULES for other in imports(name) if layer(other) > layer(name) >= 0}
    assert climbs == CLIMBS


def test_what_is_imported_is_declared():
    text = (SOURCE.parent / "pyproject.toml").read_text()
    declared = {name.lower().replace("-", "_") for name in re.findall(r'"([\w-]+)(?:\[[^]]*\])?(?:[<>=][^"]*)?"', text)}
    declared |= {"yaml", "pydantic_core", "t3d"}  # pyyaml, and a part of pydantic
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for other in (whole.partition(".")[0] for whole in found):
                assert other in sys.stdlib_module_names or other in declared, f"{name} imports {other}"


def test_tests_are_imported_from_one_root():
    """As `tests.`: a module with two names is loaded twice."""
    root = SOURCE.parent / "tests"
    own = {path.stem for path in root.rglob("*.py")} | {path.name for path in root.iterdir() if path.is_dir()}
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for name in names:
                assert name.partition(".")[0] not in own, f"{path.relative_to(root)}: import tests.{name}"
