"""The shape of the source: imports go down and never in a circle, and nothing is longer than one can take in at once.

Read from the sources alone. All imports count, those for type checkers and those inside functions too.
"""

from __future__ import annotations

import ast
import functools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "spectune"

#: a room may import the rooms of the lines below its own, and no other
ROOMS = """
    cli
    comparing serving
    reporting training
    results
    planning evaluation
    inference storage
    methods blocks
    deltas
    families
    objectives health
    compute data files
    sizes phases lazy_names torchrun version embedded
    errors
"""
FILE_LINES, FUNCTION_LINES, PARAMETERS, METHODS, ATTRIBUTES = 400, 60, 8, 15, 12
#: by room and name, what may have more parameters: entry points whose parameters are keywords that a user gives
ENTRY_POINTS = {
    "cli chat": "flags",
    "cli compare": "flags",
    "cli evaluate": "flags",
    "cli export": "flags",
    "cli generate": "flags",
    "cli merge": "flags",
    "cli plan": "flags",
    "cli recommend": "flags",
    "cli serve": "flags",
    "cli train": "flags",
    "cli validate": "flags",
    "comparing compare": "spectune.compare",
    "data encode": "spectune.data.encode",
    "evaluation of": "spectune.evaluation.Task.of",
    "planning of": "spectune.planning.Workload.of, what spectune.plan takes",
    "planning plan": "spectune.plan",
    "storage load": "spectune.load",
    "training train": "spectune.train",
}
_CHANGES = {"add", "append", "clear", "discard", "extend", "insert", "pop", "popitem", "remove", "setdefault", "update"}
Function = ast.FunctionDef | ast.AsyncFunctionDef


@functools.cache
def trees() -> dict[str, ast.Module]:
    """Every file of the package by its path inside it."""
    return {str(path.relative_to(SOURCE)): ast.parse(path.read_text("utf-8")) for path in SOURCE.rglob("*.py")}


@functools.cache
def nodes(tree: ast.Module) -> list[ast.AST]:
    return list(ast.walk(tree))


def functions(tree: ast.Module) -> list[Function]:
    return [node for node in nodes(tree) if isinstance(node, Function)]


def module_name(path: str) -> str:
    return ".".join(["spectune", *Path(path).with_suffix("").parts]).removesuffix(".__init__")


@functools.cache
def imports() -> dict[str, set[str]]:
    """The modules of the package that each module imports; what the package's own `__init__` does, lazily, left out."""
    modules = {module_name(path): tree for path, tree in trees().items()}
    found = {name: set(imported(tree, modules)) & modules.keys() for name, tree in modules.items()}
    del found["spectune"]
    return {name: targets - {name} for name, targets in found.items()}


def imported(tree: ast.Module, modules: dict[str, ast.Module]) -> Iterator[str]:
    for node in nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                # what a package's __init__ imports under a file's name is not that file
                bound = node.module in modules and alias.name in names_of(modules[node.module])
                yield inside if inside in modules and not bound else node.module


def names_of(tree: ast.Module) -> set[str]:
    """Names that a module's import statements bind."""
    bound = (node for node in nodes(tree) if isinstance(node, ast.ImportFrom))
    return {alias.asname or alias.name for node in bound for alias in node.names}


def listed(found: Iterable[object]) -> str:
    return "".join(f"\n  {line}" for line in sorted(map(str, found)))


def room_of(module: str) -> str:
    return module.split(".")[1]


def test_no_file_imports_the_package_itself() -> None:
    """Its `__init__` leads to every room."""
    found = [name for name, targets in imports().items() if "spectune" in targets]
    assert not found, listed(found)


def test_no_file_is_in_a_circle_of_imports() -> None:
    edges = {name: targets - {"spectune"} for name, targets in imports().items()}

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            fresh = edges[waiting.pop()] - seen
            seen |= fresh
            waiting += fresh
        return seen

    reach = {name: reached(name) for name in edges}
    circles = {tuple(sorted(other for other in reach[name] if name in reach[other])) for name in edges}
    assert not (found := circles - {()}), listed(found)


def test_rooms_import_downwards_only() -> None:
    levels = {room: level for level, line in enumerate(ROOMS.splitlines()) for room in line.split()}
    rooms = {room_of(name) for name in imports()} - {"__main__"}
    assert sorted(rooms - set(levels)) == []
    up = [
        f"{name} -> {target}"
        for name, targets in imports().items()
        for target in targets - {"spectune"}
        if (here := room_of(name)) != (there := room_of(target))
        if here in levels and levels[there] <= levels[here]
    ]
    assert not up, listed(up)


def test_no_file_is_too_long() -> None:
    long = {path: lines for path in trees() if (lines := (SOURCE / path).read_text("utf-8").count("\n")) > FILE_LINES}
    assert not long, listed(long.items())


def test_no_function_is_too_long() -> None:
    lengths = {
        f"{path} {function.name}": (function.end_lineno or 0) - function.lineno + 1
        for path, tree in trees().items()
        for function in functions(tree)
    }
    long = [item for item in lengths.items() if item[1] > FUNCTION_LINES]
    assert not long, listed(long)


def test_no_function_has_too_many_parameters_but_entry_points() -> None:
    many = {
        f"{path.split('/')[0]} {function.name}"
        for path, tree in trees().items()
        for function in functions(tree)
        if len(parameters(function)) > PARAMETERS
    }
    found, stale = many - set(ENTRY_POINTS), set(ENTRY_POINTS) - many
    assert not found, listed(found)
    assert not stale, f"these need no exception any more:{listed(stale)}"


def parameters(function: Function) -> list[str]:
    given = function.args
    names = [argument.arg for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return [name for name in names if name not in ("self", "cls")]


def test_no_class_has_too_many_methods_or_attributes() -> None:
    """Records may have more attributes: classes of annotated fields that none of their methods sets."""
    large = {}
    for path, tree in trees().items():
        for node in nodes(tree):
            if isinstance(node, ast.ClassDef):
                methods = [part for part in node.body if isinstance(part, Function)]
                fields = {part.target.id for part in node.body if is_field(part)}
                assigned = set(attributes_set(node))
                attributes = len(fields | assigned) if assigned else 0
                if len(methods) > METHODS or attributes > ATTRIBUTES:
                    large[f"{path} {node.name}"] = f"{len(methods)} methods, {len(fields | assigned)} attributes"
    assert not large, listed(large.items())


def is_field(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)


def attributes_set(node: ast.ClassDef) -> Iterator[str]:
    """Attributes that methods assign to `self`."""
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store) and ast.unparse(part.value) == "self":
            yield part.attr


def test_no_function_changes_what_its_module_holds() -> None:
    """State belongs to objects, and to context variables: two models, two threads and two tests must not share it."""
    changes = [f"{path}:{line} {name}" for path, tree in trees().items() for name, line in module_changes(tree)]
    assert not changes, listed(changes)


def module_changes(tree: ast.Module) -> Iterator[tuple[str, int]]:
    held = {name for statement in tree.body for name in bound_by(statement)}
    for function in functions(tree):
        local = {
            node.id for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        }
        names = held - local - set(parameters(function))
        for node in ast.walk(function):
            if isinstance(node, ast.Global):
                yield from ((name, node.lineno) for name in node.names)
            part = node.func if isinstance(node, ast.Call) else node
            if isinstance(part, ast.Attribute | ast.Subscript) and isinstance(part.value, ast.Name):
                called = isinstance(node, ast.Call) and isinstance(part, ast.Attribute) and part.attr in _CHANGES
                if part.value.id in names and (called or isinstance(part.ctx, ast.Store | ast.Del)):
                    yield part.value.id, node.lineno


def bound_by(statement: ast.stmt) -> Iterator[str]:
    """The names that a statement of a module binds; imports not among them."""
    if isinstance(statement, ast.ClassDef):
        yield statement.name
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    yield from (target.id for target in targets if isinstance(target, ast.Name))


def test_file_names_are_unique_but_for_a_command_and_what_it_calls() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for path in trees():
        if Path(path).name != "__init__.py":
            places[Path(path).stem].append(path)
    twins = {}
    for name, paths in places.items():
        rooms = {room_of(module_name(path)): module_name(path) for path in paths}
        command = rooms.pop("cli", None)
        called = {room_of(target) for target in imports()[command] - {"spectune"}} if command else set()
        if len(paths) > 1 and not (len(paths) == 2 and set(rooms) <= called):
            twins[name] = sorted(paths)
    assert not twins, listed(twins.values())


def test_no_package_exports_a_function_under_the_name_of_its_file() -> None:
    """`import package.name` would give the one, `from package import name` the other."""
    hidden = [
        f"{path}: {alias.name}"
        for path, tree in trees().items()
        if Path(path).name == "__init__.py" and path != "__init__.py"
        for node in nodes(tree)
        if isinstance(node, ast.ImportFrom) and node.module is not None
        for alias in node.names
        if node.module == f"{module_name(path)}.{alias.name}"
    ]
    assert not hidden, listed(hidden)


@pytest.mark.parametrize(
    ("source", "changes"),
    [
        ("known = {}\ndef f():\n    known['a'] = 1", ["known"]),
        ("class Now:\n    on = False\ndef f():\n    Now.on = True", ["Now"]),
        ("seen = []\ndef f():\n    seen.append(1)", ["seen"]),
        ("n = 0\ndef f():\n    global n\n    n += 1", ["n"]),
        ("known = {}\ndef f():\n    known = {}\n    known['a'] = 1", []),
        ("known = {}\ndef f(known):\n    known['a'] = 1", []),
        ("known = {}\ndef f():\n    return known['a']", []),
    ],
)
def test_changes_of_a_module_are_seen(source: str, changes: list[str]) -> None:
    assert [name for name, _ in module_changes(ast.parse(source))] == changes


#: by what is called, the only files that may: the user's own metric, our own rooms and names, the one loader of bases
RUNS_CODE = {
    "import_module(name)": {
        "__init__.py", "lazy_names.py", "cli/console.py", "evaluation/custom.py",
    },
    "exec_module": {"evaluation/custom.py"},
    "from_pretrained(trust_remote_code)": {"storage/pretrained.py", "objectives/objective.py"},
    "yaml.load": {"files/core_yaml.py"},
}  # fmt: skip
_BUILTINS = {"eval", "exec", "compile", "__import__"}
_ATTRIBUTES = {"exec_module", "load_module", "run_path", "run_module", "system", "popen", "unsafe_load", "full_load"}
_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "runpy", "code", "codeop"}


def test_code_from_elsewhere_runs_in_the_listed_places_alone() -> None:
    found = {f"{path}: {what}" for path, tree in trees().items() for what in code_runs(tree)}
    allowed = {f"{path}: {what}" for what, paths in RUNS_CODE.items() for path in paths}
    assert not found - allowed, listed(found - allowed)


def code_runs(tree: ast.Module) -> Iterator[str]:
    """What a file has that runs code, unpickles, or hands a line to a shell."""
    own = names_of(tree) | {name for function in functions(tree) for name in (function.name, *parameters(function))}
    for node in nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from (name for name in names if name.partition(".")[0] in _MODULES)
        elif isinstance(node, ast.Call):
            yield from code_runs_in(node, own)


def code_runs_in(call: ast.Call, own: set[str]) -> Iterator[str]:
    function, keywords = ast.unparse(call.func), {keyword.arg: keyword.value for keyword in call.keywords}
    last = function.rpartition(".")[2]
    false = {name for name, value in keywords.items() if isinstance(value, ast.Constant) and value.value is False}
    if last == "import_module" and not (call.args and isinstance(call.args[0], ast.Constant)):
        yield "import_module(name)"
    elif (function in _BUILTINS and function not in own) or ("." in function and last in _ATTRIBUTES):
        yield last
    elif function in ("torch.load", "numpy.load", "np.load", "torch.package", "yaml.load"):
        yield function
    if (
        "." in function
        and last in ("from_pretrained", "from_config")
        and "trust_remote_code" in keywords.keys() - false
    ):
        yield "from_pretrained(trust_remote_code)"
    if "trust_remote_code" in keywords and ast.unparse(keywords["trust_remote_code"]) == "True":
        yield "trust_remote_code=True"
    if "shell" in keywords.keys() - false:
        yield "shell"


@pytest.mark.parametrize(
    ("source", "runs"),
    [
        ("import importlib\nimportlib.import_module(name)", ["import_module(name)"]),
        ("importlib.import_module('gguf')", []),
        ("spec.loader.exec_module(module)", ["exec_module"]),
        ("import pickle", ["pickle"]),
        ("from joblib.externals import x", ["joblib.externals"]),
        ("eval('1')", ["eval"]),
        ("model.eval()", []),
        ("from torch import compile\ncompile(block)", []),
        ("torch.load(path, weights_only=True)", ["torch.load"]),
        ("kind.from_pretrained(x, trust_remote_code=asked)", ["from_pretrained(trust_remote_code)"]),
        ("kind.from_pretrained(x, trust_remote_code=False)", []),
        ("load(x, trust_remote_code=True)", ["trust_remote_code=True"]),
        ("load(x, trust_remote_code=asked)", []),
        ("subprocess.run(line, shell=True)", ["shell"]),
        ("os.system(line)", ["system"]),
    ],
)
def test_what_runs_code_is_seen(source: str, runs: list[str]) -> None:
    assert list(code_runs(ast.parse(source))) == runs


def test_all_that_is_printed_is_made_plain() -> None:
    """Consoles of rich, but for silent ones, and typer's echo would write text as it is."""
    found = [
        f"{path}:{node.lineno}"
        for path, tree in trees().items()
        if path != "files/plain_console.py"
        for node in nodes(tree)
        if isinstance(node, ast.Call)
        if (name := ast.unparse(node.func)) in ("typer.echo", "click.echo", "rich.print")
        or (name.rpartition(".")[2] == "Console" and "quiet=True" not in ast.unparse(node))
    ]
    assert not found, listed(found)


def test_a_command_that_is_to_be_typed_is_quoted_for_the_shell() -> None:
    """`command_line` writes it: a flag with a name behind it is never put together by hand."""
    hint = re.compile(r"(`?spectune [a-z]+|same command|goes on with|To go on)[^`]*--[a-z-]+ \{")
    found = [
        f"{path}:{node.lineno}"
        for path, tree in trees().items()
        for node in nodes(tree)
        if isinstance(node, ast.JoinedStr) and hint.search(ast.unparse(node))
    ]
    assert not found, listed(found)
