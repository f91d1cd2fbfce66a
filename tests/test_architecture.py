"""Who imports whom: data flows one way, so no module needs one that needs it."""

import ast
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
