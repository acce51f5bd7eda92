"""What the documentation shows is what happens: its code blocks and examples are run."""

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import numbasoft

README = Path(__file__).parents[1] / "README.md"
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
PUBLIC = [name for name in numbasoft.__all__ if inspect.isfunction(getattr(numbasoft, name))]


def blocks():
    """The Python code blocks of the README, with the line that each begins on."""
    text = README.read_text(encoding="utf-8") if README.exists() else ""
    for match in re.finditer(r"^```(?:python|py|pycon)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield text.count("\n", 0, match.start()) + 2, match.group(1)


def test_the_readme_executes(tmp_path, monkeypatch):
    # in one namespace from top to bottom, as a reader would type it, in a directory of its own
    monkeypatch.chdir(tmp_path)
    found = list(blocks())
    assert found, "the README has a quick start in a python block"
    namespace = {"__name__": "readme"}
    for line, code in found:
        try:
            if ">>>" in code:
                run_examples(
                    doctest.DocTestParser().get_doctest(code, namespace, "README.md", str(README), line)
                )
            else:
                exec(compile("\n" * (line - 1) + code, str(README), "exec"), namespace)
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("numbasoft"):
                raise
            pytest.skip(f"the block at line {line} needs {error.name}, which is not installed")


def run_examples(test):
    failures = []
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    runner.run(test, out=failures.append, clear_globs=False)
    assert not runner.failures, "".join(failures)


def test_the_quick_start_is_short():
    _, code = next(blocks())
    assert (
        len([line for line in code.splitlines() if line.strip() and not line.strip().startswith("#")]) <= 10
    )


@pytest.mark.parametrize("name", PUBLIC)
def test_examples_of_public_functions(name):
    function = getattr(numbasoft, name)
    (test,) = doctest.DocTestFinder(recurse=False).find(function, name, globs={})
    assert test.examples, f"{name} has no example"
    run_examples(test)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_docstrings_name_every_parameter(name):
    function = getattr(numbasoft, name)
    text = inspect.getdoc(function)
    for parameter in inspect.signature(function).parameters:
        assert re.search(
            rf"^\*{{0,2}}{parameter}\b.*:|^{parameter}, |, {parameter}\b.*:", text, re.MULTILINE
        ), parameter
    for section in ("Parameters", "Returns", "Raises", "Examples"):
        assert re.search(rf"^{section}\n-+$", text, re.MULTILINE), f"no section {section}"


def documented_modules():
    for module in pkgutil.walk_packages(numbasoft.__path__, "numbasoft."):
        if not module.name.endswith("__main__"):
            yield module.name


@pytest.mark.parametrize("name", sorted(documented_modules()))
def test_examples_in_modules(name):
    # whichever examples there are in the docstrings of a module's own functions
    if ".cuda" in name.removeprefix("numbasoft.cuda") or name.startswith("numbasoft.cuda."):
        pytest.importorskip("numba_cuda", reason=f"{name} needs numba-cuda, which is not installed")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("numbasoft"):
            raise
        pytest.skip(f"{name} needs {error.name}, which is not installed")
    empty = not Path(module.__file__).read_text(encoding="utf-8").strip()
    assert module.__doc__ or empty, f"{name} does not say what it is for"
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, name):
        run_examples(test)
