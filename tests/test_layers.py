import ast
import builtins
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import sparse_attention_decoder
from sparse_attention_decoder import errors

PACKAGE = sparse_attention_decoder.__name__
SRC = Path(sparse_attention_decoder.__file__).parent
TEXTS = {path.relative_to(SRC).as_posix(): path.read_text("utf-8") for path in sorted(SRC.rglob("*.py"))}
MODULES = {module: ast.parse(text) for module, text in TEXTS.items()}
# design: imports point only down; a module or folder that is not listed here has no place yet
LEVELS = {
    "tables": 0,
    "errors": 0,
    "given": 0,
    "config": 0,
    "selection": 0,
    "kernels": 1,
    "cache": 2,
    "policies": 3,
    "ledger": 4,
    "dial": 4,
    "attention": 4,
    "prefill": 4,
    "ready": 5,
    "models": 6,
    "decoder": 7,
    "session": 7,
    "trace": 7,
    "measure": 8,
    "cli": 9,
}
LONGEST_FUNCTION, LONGEST_FILE = 60, 300


def level(module: str) -> int:
    """Of a path such as kernels/reference.py or a name such as sparse_attention_decoder.kernels.reference."""
    return LEVELS[re.split(r"[./]", module.removeprefix(f"{PACKAGE}."))[0]]


def imported(node: ast.AST) -> Iterator[str]:
    """Full names of the modules that an import statement names; other statements name none."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: imports are absolute"
        yield node.module or ""


def imports_of(module: str) -> set[str]:
    return {name for node in ast.walk(MODULES[module]) for name in imported(node)}


def is_for_typing_alone(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def runtime_imports_of(module: str) -> set[str]:
    """Without what stands under TYPE_CHECKING."""
    kept = [node for node in MODULES[module].body if not is_for_typing_alone(node)]
    return {name for node in kept for inner in ast.walk(node) for name in imported(inner)}


@pytest.mark.parametrize("module", [module for module in MODULES if module != "__init__.py"])
def test_imports_point_only_down(module):
    ours = {name for name in imports_of(module) if name.split(".")[0] == PACKAGE}
    # the package itself may be asked for its version; its other names are lazy and lead up
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.ImportFrom) and node.module == PACKAGE:
            assert [alias.name for alias in node.names] == ["__version__"]
    up = {name for name in ours - {PACKAGE} if level(name) > level(module)}
    assert not up, f"level {level(module)} imports {up}"


def test_no_module_needs_itself_to_be_imported():
    graph = {}
    for module in MODULES:
        name = ".".join([PACKAGE, *Path(module).with_suffix("").parts]).removesuffix(".__init__")
        eager = [node for node in MODULES[module].body if not is_for_typing_alone(node)]
        graph[name] = {target for node in eager for target in imported(node)} - {PACKAGE}
    assert set(TopologicalSorter(graph).static_order()) >= set(graph)


# measure/peers/ holds programs for other environments: they import what is there, and nothing of ours
@pytest.mark.parametrize(
    "module", [m for m in MODULES if not m.startswith(("models/", "measure/peers/")) and m != "decoder.py"]
)
def test_transformers_is_imported_by_models_and_decoder_alone(module):
    assert not {name for name in runtime_imports_of(module) if name.split(".")[0] == "transformers"}


def test_importing_the_package_and_everything_below_models_loads_no_transformers():
    below = [f"{PACKAGE}.{name}" for name, at in LEVELS.items() if at < LEVELS["models"]]
    code = (
        f"import sys, {PACKAGE}, {', '.join(below)}\n"
        f"from {PACKAGE}.tables import BACKENDS, POLICIES, load\n"
        "[load(row) for row in (*POLICIES.values(), *BACKENDS.values())]\n"
        "print(*sys.modules.keys() & {'transformers', 'triton', 'rich', 'typer'})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.stdout, run.stderr) == ("\n", "")


def test_all_is_sorted_and_is_what_dir_shows():
    shown = [name for name in dir(sparse_attention_decoder) if not name.startswith("__")]
    assert sparse_attention_decoder.__all__ == sorted(sparse_attention_decoder.__all__) == shown


@pytest.mark.parametrize("name", sparse_attention_decoder.__all__)
def test_every_public_name_is_there(name):
    assert getattr(sparse_attention_decoder, name).__name__ == name


def test_a_name_that_is_not_public_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'SparseAtention'"):
        _ = sparse_attention_decoder.SparseAtention


ERRORS = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]


def test_the_drawn_tree_of_errors_is_the_real_one():
    drawn, path = {}, ["Exception"]
    for line in errors.__doc__.splitlines():
        if found := re.match(r"([ │├└─]*)(\w+Error)\b(?: +\((\w+)\))?", line):
            indent, name, builtin = found.groups()
            path[1 + len(indent) // 4 :] = [name]
            drawn[name] = {path[-2], builtin} - {None}
    assert drawn == {error.__name__: {base.__name__ for base in error.__bases__} for error in ERRORS}


@pytest.mark.parametrize("error", [error for error in ERRORS if error is not errors.SparseAttentionError])
def test_every_error_is_ours_and_a_built_in_one_too(error):
    assert issubclass(error, errors.SparseAttentionError)
    specific = {base for base in error.__mro__ if getattr(builtins, base.__name__, None) is base}
    assert specific - {Exception, BaseException, object}


@pytest.mark.parametrize("module", MODULES)
def test_files_and_functions_are_short(module):
    assert len(TEXTS[module].splitlines()) <= LONGEST_FILE
    functions = [node for node in ast.walk(MODULES[module]) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    assert not {name: lines for name, lines in long.items() if lines > LONGEST_FUNCTION}
