"""The rules of the house, checked on the syntax trees of the package."""

import ast
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import pytest_collection_modifyitems

import numbasoft

PACKAGE = Path(numbasoft.__file__).parent


def name_of(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PATHS = {name_of(p): p for p in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in PATHS.items()}
ROOMS = sorted(p.name for p in (PACKAGE / "ops").iterdir() if (p / "__init__.py").exists())


def absolute(module, node):
    """The module that an `import from` names, in full."""
    if not node.level:
        return node.module
    parts = module.split(".")
    if PATHS[module].name != "__init__.py":
        parts = parts[:-1]
    parts = parts[: len(parts) - node.level + 1]
    return ".".join([*parts, *filter(None, [node.module])])


def imports(module, tree=None):
    """Everything that a module imports, wherever in it, as dotted names."""
    for node in ast.walk(tree or TREES[module]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = absolute(module, node)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def own_imports(module, tree=None):
    """The modules of the package that a module imports."""
    for name in imports(module, tree):
        if name.partition(".")[0] == "numbasoft":
            while name not in PATHS:
                name = name.rpartition(".")[0]
            yield name


def within(name, *packages):
    return any(name == p or name.startswith(p + ".") for p in packages)


def room(module):
    parts = module.split(".")
    return parts[2] if parts[:2] == ["numbasoft", "ops"] and len(parts) > 2 else None


def floor(module):
    """The floor that a module stands on; imports lead to lower ones, or stay on one of the shared floors."""
    if within(module, "numbasoft.__main__", "numbasoft.report"):
        return 8
    if within(module, "numbasoft.scipy", "numbasoft.calibration"):
        return 7
    if module in ("numbasoft", "numbasoft.literal", "numbasoft.cuda.literal"):
        return 6
    if module == "numbasoft.overloads":
        return 5
    if room(module):
        return 4 if module.endswith(".api") or module.count(".") == 2 else 3
    if module in ("numbasoft.arrays", "numbasoft.checks", "numbasoft.elementwise"):
        return 2
    if within(module, "numbasoft.cuda"):
        return 2  # with the checks and layouts of device arrays; arrays.py leads there when one comes
    if within(module, "numbasoft.vector"):
        return 0
    return 0 if module == "numbasoft.jit" else 1


SHARED_FLOORS = (0, 1, 2, 7, 8)


@pytest.mark.parametrize("module", PATHS)
def test_imports_point_one_way(module):
    for imported in own_imports(module):
        here, there = floor(module), floor(imported)
        assert there < here or (there == here and here in SHARED_FLOORS), f"{module} imports {imported}"


def test_no_module_imports_itself_through_others():
    edges = {module: set(own_imports(module)) - {module} for module in PATHS}
    remaining = dict(edges)
    while free := [m for m, targets in remaining.items() if not targets & remaining.keys()]:
        for m in free:
            del remaining[m]
    assert not remaining, f"a circle among {sorted(remaining)}"


@pytest.mark.parametrize("module", [m for m in PATHS if room(m)])
def test_a_room_never_imports_another_room(module):
    foreign = [m for m in own_imports(module) if room(m) not in (None, room(module))]
    assert not foreign, f"what two rooms share moves down a floor: {foreign}"


@pytest.mark.parametrize("name", ROOMS)
def test_every_room_has_the_same_files(name):
    assert {"__init__.py", "api.py", "cpu.py"} <= {p.name for p in (PACKAGE / "ops" / name).iterdir()}


KERNELS = [m for m in PATHS if room(m) and m.endswith((".cpu", ".cuda"))]


@pytest.mark.parametrize("module", KERNELS)
def test_kernels_never_validate(module):
    assert not [m for m in own_imports(module) if m == "numbasoft.checks"]
    assert not [n for n in ast.walk(TREES[module]) if isinstance(n, (ast.Raise, ast.Assert))]


def test_there_are_rooms_to_check():
    assert {"softmax", "log_softmax", "logsumexp"} <= set(ROOMS)
    assert all(f"numbasoft.ops.{name}.cpu" in PATHS for name in ROOMS)


# --- Numba -------------------------------------------------------------------------------------------------

COMPILERS = {
    "njit",
    "jit",
    "generated_jit",
    "vectorize",
    "guvectorize",
    "stencil",
    "cfunc",
    "register_jitable",
}
OPTIONS = {
    "fastmath",
    "parallel",
    "nogil",
    "boundscheck",
    "error_model",
    "forceinline",
    "nopython",
    "no_cpython_wrapper",
}


@pytest.mark.parametrize("module", [m for m in PATHS if m not in ("numbasoft.jit", "numbasoft.cuda.jit")])
def test_only_jit_names_compiler_options(module):
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.ImportFrom) and within(node.module or "", "numba"):
            named = COMPILERS & {alias.name for alias in node.names}
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in ("numba", "nb")
        ):
            named = COMPILERS & {node.attr}
        elif isinstance(node, ast.Call):
            named = OPTIONS & {keyword.arg for keyword in node.keywords}
        else:
            continue
        assert not named, f"{module}, line {node.lineno}, names {named}: only jit.py does that"


def at_import(module):
    """What a module runs when it is imported: its text without the bodies of functions and classes."""
    kept = [n for n in TREES[module].body if not isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    return ast.Module(kept, [])


def is_for_cuda(module):
    return within(module, "numbasoft.cuda") or module.rpartition(".")[2].startswith("cuda")


@pytest.mark.parametrize("module", [m for m in PATHS if not is_for_cuda(m) or m == "numbasoft.cuda"])
def test_cuda_is_imported_where_it_is_used(module):
    # the package numbasoft.cuda, and cuda*.py in a room; elsewhere only when a device array has come
    named = [*imports(module, at_import(module))]
    assert not [name for name in named if within(name, "numba.cuda", "cupy", "torch")]
    other = [m for m in own_imports(module, at_import(module)) if is_for_cuda(m) and m != "numbasoft.cuda"]
    assert not other, f"{module} imports {other} when it is imported"


@pytest.mark.parametrize("module", [m for m in PATHS if is_for_cuda(m)])
def test_device_code_is_written_in_intrinsics_only(module):
    # a second back end is a second such module; all others are written in terms of its names
    if module != "numbasoft.cuda.intrinsics":
        text = PATHS[module].read_text(encoding="utf-8")
        assert not re.search(r"\.global|shfl\.|\.rn\.|llvmlite|builder\.|@intrinsic", text)


def test_the_simulator_has_the_names_of_the_intrinsics():
    def public(name):
        return {n.name: n for n in TREES[name].body if isinstance(n, ast.FunctionDef)}

    real, simulated = public("numbasoft.cuda.intrinsics"), public("numbasoft.cuda.simulated")
    used = {
        alias.name
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").endswith("backend")
        for alias in node.names
    } - {"backend", "*"}
    assert used and used <= set(real) & set(simulated)


@pytest.mark.parametrize("module", [m for m in PATHS if not within(m, "numbasoft.vector")])
def test_llvm_code_is_written_in_vector_only(module):
    # jit.py and the report may ask llvmlite for its version and the machine's name
    names = [name for name in imports(module) if within(name, "llvmlite")]
    if module == "numbasoft.cuda.intrinsics":
        return
    if module == "numbasoft.jit" or within(module, "numbasoft.report"):
        names = [name for name in names if within(name, "llvmlite.ir")]
    assert not names


def test_the_package_holds_public_names_and_nothing_else():
    allowed = (ast.Import, ast.ImportFrom)
    for node in TREES["numbasoft"].body:
        documentation = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        dunder = isinstance(node, ast.Assign) and all(t.id.startswith("__") for t in node.targets)
        dunder = dunder or (isinstance(node, ast.FunctionDef) and node.name in ("__dir__", "__getattr__"))
        assert isinstance(node, allowed) or documentation or dunder, f"line {node.lineno}"
    assert set(PUBLIC) <= set(numbasoft.__all__)
    assert all(hasattr(numbasoft, name) for name in numbasoft.__all__)


# --- what an import costs ----------------------------------------------------------------------------------

LOADED = """
import json, sys, numba
before = set(sys.modules)
import numbasoft
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def test_importing_the_package_imports_little():
    done = subprocess.run(
        [sys.executable, "-c", LOADED],
        capture_output=True, text=True, timeout=120, check=True,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
    )  # fmt: skip
    loaded = json.loads(done.stdout.splitlines()[-1])
    assert "numbasoft" in loaded
    unwanted = (
        "numba.cuda",
        "scipy",
        "torch",
        "onnx",
        "jax",
        "matplotlib",
        "sklearn",
        "numbasoft.report",
        "numbasoft.scipy",
        "numbasoft.calibration",
        "numbasoft.cuda",
    )
    assert not [m for m in loaded if within(m, *unwanted)]


# --- signatures --------------------------------------------------------------------------------------------

PUBLIC = {
    "softmax": "(x, axis=-1, *, temperature=1.0, where=None, out=None, stream=None)",
    "log_softmax": "(x, axis=-1, *, temperature=1.0, where=None, out=None, stream=None)",
    "logsumexp": "(x, axis=-1, *, temperature=1.0, where=None, keepdims=False, out=None, stream=None)",
    "softmax_backward": "(grad, y, axis=-1, *, temperature=1.0, out=None, stream=None)",
    "log_softmax_backward": "(grad, log_y, axis=-1, *, temperature=1.0, out=None, stream=None)",
    "logsumexp_backward": "(grad, x, lse, axis=-1, *, temperature=1.0, out=None, stream=None)",
    "cross_entropy": "(logits, target, *, axis=-1, weight=None, ignore_index=-100, label_smoothing=0.0, "
    "z_loss=0.0, temperature=1.0, reduction='mean', stream=None)",
    "cross_entropy_value_and_grad": "(logits, target, *, axis=-1, weight=None, ignore_index=-100, "
    "label_smoothing=0.0, z_loss=0.0, temperature=1.0, reduction='mean', out=None, stream=None)",
    "cross_entropy_backward": "(grad, logits, target, *, lse=None, axis=-1, weight=None, ignore_index=-100, "
    "label_smoothing=0.0, z_loss=0.0, temperature=1.0, reduction='mean', out=None, stream=None)",
    "token_log_probs": "(logits, ids, *, axis=-1, temperature=1.0, stream=None)",
    "perplexity": "(logits, target, *, axis=-1, ignore_index=-100, temperature=1.0, stream=None)",
    "binary_cross_entropy": "(logits, target, *, pos_weight=1.0, reduction='mean', stream=None)",
    "binary_cross_entropy_backward": "(grad, logits, target, *, pos_weight=1.0, reduction='mean', out=None, "
    "stream=None)",
    "kl_divergence": "(p_logits, q_logits, *, axis=-1, temperature=1.0, reduction='mean', stream=None)",
    "kl_divergence_backward": "(grad, p_logits, q_logits, *, axis=-1, temperature=1.0, reduction='mean', "
    "out=None, stream=None)",
    "sigmoid": "(x, *, out=None, stream=None)",
    "sigmoid_backward": "(grad, y, *, out=None, stream=None)",
    "logit": "(p, *, out=None, stream=None)",
    "fit_temperature": "(logits, target, *, axis=-1, ignore_index=-100, stream=None)",
    "sample": "(logits, *, axis=-1, temperature=1.0, top_k=None, top_p=None, min_p=None, rng=None, stream=None)",
    "gumbel_softmax": "(logits, *, axis=-1, temperature=1.0, hard=False, rng=None, out=None, stream=None)",
    "nll_loss": "(log_probs, target, *, axis=-1, weight=None, ignore_index=-100, reduction='mean', "
    "stream=None)",
    "nll_loss_backward": "(grad, log_probs, target, *, axis=-1, weight=None, ignore_index=-100, "
    "reduction='mean', stream=None)",
}


@pytest.mark.parametrize("name", PUBLIC)
def test_signatures(name):
    signature = inspect.signature(getattr(numbasoft, name))
    bare = signature.replace(
        parameters=[p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()],
        return_annotation=inspect.Signature.empty,
    )
    assert str(bare) == PUBLIC[name]


def test_importing_the_benchmarks_starts_no_threads():
    # asv forks a process that has imported them, and Numba's threads do not survive that
    code = """
import importlib, pkgutil
import benchmarks
from numba.np.ufunc import parallel
for module in pkgutil.iter_modules(benchmarks.__path__):
    if module.name != "compare" and not module.name.startswith("gpu"):
        importlib.import_module("benchmarks." + module.name)
print(parallel._is_initialized)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "False\n"


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
@pytest.mark.parametrize("total", [0, 1, 5, 100])
def test_what_takes_minutes_begins_first_and_every_test_is_done_once(workers, total):
    class Test:
        def __init__(self, number):
            self.number = number

        def get_closest_marker(self, name):
            return name == "minutes" and self.number % 9 == 8

    config = SimpleNamespace(**({} if workers == 1 else {"workerinput": {"workercount": workers}}))
    items = [Test(number) for number in range(total)]
    pytest_collection_modifyitems(config, items)
    numbers = [item.number for item in items]
    assert sorted(numbers) == list(range(total))
    if workers == 1:
        assert numbers == list(range(total))
        return
    slow, begin = [number for number in range(total) if number % 9 == 8], 0
    for k in range(workers):  # the shares that xdist's worksteal gives them
        end = begin + (total - begin) // (workers - k)
        own = slow[k::workers][: end - begin]
        assert numbers[begin : begin + len(own)] == own
        begin = end
