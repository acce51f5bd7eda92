"""pytest-benchmark: one library on every workload of the report. Results are checked before they are timed."""

import pytest

from numbasoft.report import rivals, workloads

SMALL = 1 << 22  # bytes


@pytest.fixture(scope="module")
def library(request):
    chosen = rivals.EVERYONE[request.config.getoption("--library")]
    missing = chosen.missing()
    if missing:
        pytest.skip(f"{chosen.name} needs {missing}, which is not here")
    return chosen(request.config.getoption("--threads"))


@pytest.mark.parametrize(
    "work", dict.fromkeys((*workloads.REPORT, *workloads.LOSS)), ids=lambda work: work.name
)
def test_compare(benchmark, request, library, work):
    inputs = work.inputs()
    if request.config.getoption("--small") and work.bytes_moved > SMALL:
        pytest.skip("a large shape, and --small was given")
    try:
        call, read = library.prepare(work, inputs)
        result = call()
    except NotImplementedError as lacks:
        pytest.skip(f"{library.name}: {lacks}")
    if not isinstance(library, rivals.Copy):
        assert work.difference(read(result), work.expected(inputs)) <= 1
    benchmark.group = work.name
    benchmark.extra_info.update(library=library.name, threads=library.threads, bytes=work.bytes_moved)
    benchmark(call)
