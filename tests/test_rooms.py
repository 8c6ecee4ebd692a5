"""A room of the package imports only from those before it, and no module from itself over others."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import timm_selfdistill

PACKAGE = Path(timm_selfdistill.__file__).parent
ROOMS = [
    [
        "version",
        "timm_model",
        "output",
        "stages",
        "heads",
        "cost",
        "summary",
        "mapped_file",
        "memory",
        "loss",
        "timm_methods",
        "pictures",
    ],
    ["hub"],
    ["truncated", "model"],
    ["task"],
    ["models"],
    ["baselines"],
    ["inference"],
    ["training.config"],
    ["training.runtime"],
    ["training.data"],
    ["training.state"],
    ["training.outputs"],
    ["training.loop"],
    ["training"],
    ["analysis"],
    ["demo"],
    ["cli"],
    ["__main__", ""],
]
"""From the ground up, as in docs/architecture.md."""
LONGEST = 60
ORDER = {name: number for number, names in enumerate(ROOMS) for name in names}


def long_functions() -> list[str]:
    """Functions of more than `LONGEST` lines, the examples in their docstrings aside."""
    return [
        f"{path.relative_to(PACKAGE)}: {node.name}, {lines} lines"
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and (lines := count_lines(node)) > LONGEST
    ]


def count_lines(function: ast.FunctionDef) -> int:
    _, _, examples = (ast.get_docstring(function) or "").partition("\n\nExamples:")
    shown = 2 + examples.count("\n") if examples else 0  # an empty line and the heading are above them
    return function.end_lineno - function.lineno + 1 - shown


def imports(path: Path) -> dict[str, bool]:
    """Modules of the package that a file imports, but for annotations alone, and whether it does when it is imported
    itself."""
    parts = [PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts]
    package = parts[:-1]
    tree, found = ast.parse(path.read_text()), {}
    at_once = {id(node) for node in tree.body}
    annotating = {
        id(node)
        for block in tree.body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in block.body
    }
    for node in ast.walk(tree):
        if id(node) in annotating:
            continue
        if isinstance(node, ast.ImportFrom) and (node.level or str(node.module).startswith(PACKAGE.name)):
            base = package[: len(package) - node.level + 1] if node.level else []
            full = [*base, *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                whole = [*full[1:], alias.name]
                is_module = PACKAGE.joinpath(*whole).is_dir() or PACKAGE.joinpath(*whole).with_suffix(".py").exists()
                found[".".join(whole if is_module else full[1:])] = id(node) in at_once
    return found


def room(module: str) -> str:
    parts = module.split(".")
    return next(name for n in range(len(parts), -1, -1) if (name := ".".join(parts[:n])) in ORDER)


def files() -> dict[str, Path]:
    named = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    return {name.removesuffix("__init__").removesuffix("."): path for name, path in named.items()}


def test_no_room_imports_a_later_one():
    upward = [
        f"{name or PACKAGE.name} imports {other}"
        for name, path in files().items()
        for other in imports(path)
        if ORDER[room(other)] > ORDER[room(name)]
    ]
    assert not upward


def test_a_function_fits_a_screen():
    assert not long_functions()


def test_there_is_no_circle():
    """Of what files import when they are imported."""
    graph = {name: {other for other, at_once in imports(path).items() if at_once} for name, path in files().items()}
    TopologicalSorter(graph).prepare()
