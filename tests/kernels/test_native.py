"""C kernels: built once, in torch's own threads, and quietly left out where that is not possible."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from compress_kernels import native

SOURCE = """
#include <omp.h>
#include <stdint.h>
typedef void (*Part)(int64_t, int64_t, void*);
int32_t torch_parallel_for(int64_t, int64_t, int64_t, Part, void*);
static void part(int64_t begin, int64_t end, void* out) {
  for (int64_t i = begin; i < end; ++i) ((int32_t*)out)[i] = omp_get_thread_num();
}
int32_t through_torch(int32_t* out) { return torch_parallel_for(0, 8, 1, part, out); }
int32_t openmp(void) {
  int32_t count = 0;
  #pragma omp parallel reduction(+ : count)
  count += 1;
  return count;
}
"""
pytestmark = pytest.mark.skipif(native.build("int here;") is None, reason="no native kernels on this machine")


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    native.build.cache_clear()
    monkeypatch.setattr(native, "_reasons", [])
    yield tmp_path
    native.build.cache_clear()


def files(home):
    return sorted(path.name for path in (home / ".cache" / "compress-kernels").iterdir())


def runtimes():
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split()[-1] for line in lines if "libgomp" in line}


def test_a_library_runs_in_the_threads_of_torch(home):
    before, loaded = torch.get_num_threads(), runtimes()
    torch.set_num_threads(2)
    try:
        library, out = native.build(SOURCE), (ctypes.c_int32 * 8)()
        assert library.through_torch(out) == 0 and list(out) == [0, 0, 0, 0, 1, 1, 1, 1]
        assert library.openmp() == 2
    finally:
        torch.set_num_threads(before)
    assert runtimes() == loaded  # two of them would fight for the processors


def test_a_second_build_finds_the_first(home):
    assert native.build(SOURCE) is not None
    first = files(home)
    native.build.cache_clear()
    assert native.build(SOURCE) is not None and files(home) == first and len(first) == 1


def test_processes_may_build_at_once(home):
    code = f"from compress_kernels import native; assert native.build({SOURCE!r}).openmp() > 0, native.reason()"
    folder = str(Path(native.__file__).parent.parent)
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {folder!r}); {code}"]
    running = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait() for process in running] == [0, 0]
    assert len(files(home)) == 1


def test_a_failing_build_gives_its_reason(home):
    assert native.build("#error no such instructions\n") is None
    assert "no such instructions" in native.reason() and "\n" not in native.reason()
    assert files(home) == []


def test_without_a_compiler_there_is_no_library(home, monkeypatch):
    monkeypatch.setattr(native, "which", lambda name: None)
    assert native.build(SOURCE) is None and native.reason() == "there is no C compiler"


def test_without_a_folder_there_is_no_library(home):
    (home / ".cache").write_text("a file")
    assert native.build(SOURCE) is None and ".cache" in native.reason()
