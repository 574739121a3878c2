"""setup.py with and without nvcc, and what the finished library asks of the loader. Most of it runs
on a stand-in for nvcc, so that it needs none."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.building import (
    ROOT,
    a_checkout,  # noqa: F401
    a_setup_py,  # noqa: F401
    needs_gxx,
    run_setup,
    the_library,  # noqa: F401
    tool,
)

SYMBOLS = ROOT / "tests" / "helpers" / "torch_symbols.txt"
KNOWN = (75, 80, 86, 89, 90, 100, 120)

# A compiler of .cu files in as few words as it takes: it knows the archs in KNOWN, names the folder
# of its runtime, and hands what it is to compile to g++.
NVCC = """#!/bin/sh
echo "$*" >> {log}
case "$*" in
*--list-gpu-code*) printf 'sm_%s\\n' {known}; exit;;
*--dryrun*) echo '#$ LIBRARIES=  "-L{folder}/stubs" "-L{folder}"' >&2; exit;;
*-cubin*) {probe};;
esac
for word; do case "$word" in *.cu) source=$word;; esac; done
while [ $# -gt 0 ]; do case "$1" in -o) out=$2;; -MF) deps=$2;; esac; shift; done
g++ -x c++ -fPIC -MD -MF "$deps" -c "$source" -o "$out"
"""


@pytest.fixture
def with_kernels(checkout):
    """The stand-in for csrc/ with a kernel, and a binding that says what it was told."""
    (checkout / "csrc" / "cuda").mkdir()
    (checkout / "csrc" / "cuda" / "kernels.cu").write_text("int kernel() { return 1; }\n")
    (checkout / "csrc" / "cuda" / "bindings.cpp").write_text(
        '#ifdef HYLORA_NO_CUDA\nchar told[] = "none: " HYLORA_NO_CUDA;\n'
        '#else\nchar told[] = "archs: " HYLORA_CUDA_ARCHS ".";\n#endif\n'
        'extern "C" __attribute__((visibility("default"))) const char* what() { return told; }\n'
    )
    return checkout


@pytest.fixture
def nvcc(tmp_path):
    """A function that makes a CUDA_HOME with the stand-in for nvcc."""

    def make(known=KNOWN, probe="exit 0", runtime=True) -> Path:
        home = tmp_path / "cuda home"
        (home / "bin").mkdir(parents=True)
        words = {"log": f"'{home / 'log'}'", "folder": tmp_path / "lib", "probe": probe}
        words["known"] = " ".join(map(str, known))
        (home / "bin" / "nvcc").write_text(NVCC.format(**words))
        (home / "bin" / "nvcc").chmod(0o755)
        (tmp_path / "lib").mkdir()
        if runtime:
            subprocess.run(["ar", "rc", tmp_path / "lib" / "libcudart_static.a"], check=True)
        return home

    return make


def told(folder: Path) -> str:
    """What the binding of the library that was built was told."""
    content = (folder / "hylora_kernels" / "_csrc.so").read_bytes()
    return re.search(rb"(none|archs): [ -~]*", content)[0].decode()


# What is made


@needs_gxx
def test_where_there_is_nvcc_its_kernels_are_linked(with_kernels, nvcc):
    home = nvcc()
    done = run_setup(with_kernels, "build_csrc", CUDA_HOME=str(home), MAX_JOBS="1")
    assert done.returncode == 0, done.stderr
    assert told(with_kernels) == "archs: 80 86 89 90 100 120."
    assert "nvcc csrc/cuda/kernels.cu" in done.stdout and "CUDA" not in done.stderr
    command = (home / "log").read_text().splitlines()[-1]
    codes = "compute_80,sm_80,sm_86,sm_89,sm_90,sm_100,sm_120"
    assert f"--threads 1 -gencode=arch=compute_80,code=[{codes}]" in command
    assert "-std=c++17" in command and "-Xcompiler -fPIC,-fvisibility=hidden" in command
    again = run_setup(with_kernels, "build_csrc", CUDA_HOME=str(home), MAX_JOBS="1")
    assert "nvcc" not in again.stdout, "only what changed is compiled again"


@needs_gxx
@pytest.mark.parametrize(
    ("archs", "codes"),
    [
        ("90", "arch=compute_80,code=[compute_80,sm_90]"),
        ("90;80, 86", "arch=compute_80,code=[compute_80,sm_80,sm_86,sm_90]"),
        ("120", "arch=compute_80,code=[compute_80,sm_120]"),
    ],
)
def test_the_architectures_can_be_chosen(setup_py, nvcc, archs, codes, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(nvcc()))
    monkeypatch.setenv("HYLORA_CUDA_ARCHS", archs)
    cuda = setup_py.find_cuda()
    assert " ".join(cuda.flags).endswith(f"-gencode={codes}")
    assert setup_py.cuda_macros(cuda) == [f'-DHYLORA_CUDA_ARCHS="{" ".join(map(str, cuda.archs))}"']


def test_what_nvcc_does_not_know_is_left_out(setup_py, nvcc, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_HOME", str(nvcc(known=(80, 86, 89, 90))))
    assert setup_py.find_cuda().archs == [80, 86, 89, 90]
    assert capsys.readouterr().err.endswith("nvcc leaves out sm_100, sm_120\n")
    monkeypatch.setenv("HYLORA_CUDA_ARCHS", "100")
    with pytest.raises(setup_py.NoCuda, match="knew none of sm_100"):
        setup_py.find_cuda()


@pytest.mark.parametrize("archs", ["sm_90", "75", "90 x", "9.0", "90a"])
def test_other_words_for_architectures_are_refused(setup_py, archs, monkeypatch):
    monkeypatch.setenv("HYLORA_CUDA_ARCHS", archs)
    with pytest.raises(SystemExit, match=f'"none" or numbers from 80 on .* got {archs!r}'):
        setup_py.find_cuda()


REASONS = {
    "no nvcc was found": {"absent": True},
    "HYLORA_CUDA_ARCHS was none": {"HYLORA_CUDA_ARCHS": "none"},
    "libcudart_static.a wasn't there": {"runtime": False},
    "nvcc didn't accept the C++ compiler": {"probe": "echo unsupported GNU version >&2; exit 1"},
    "knew none of sm_80": {"known": (60, 70)},
}


@needs_gxx
@pytest.mark.parametrize("reason", REASONS)
def test_without_cuda_the_library_is_built_and_says_why(reason, with_kernels, nvcc, tmp_path):
    given = REASONS[reason].copy()
    environment = {k: given.pop(k) for k in ("HYLORA_CUDA_ARCHS",) if k in given}
    home = tmp_path if given.pop("absent", False) else nvcc(**given)
    environment["CUDA_HOME"] = str(home)
    done = run_setup(with_kernels, "build_csrc", **environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("hylora_kernels: no CUDA kernels: ") == 1 and reason in done.stderr
    assert reason in told(with_kernels), "the library repeats it at run time"
    assert ("unsupported GNU version" in done.stderr) == ("accept" in reason)
    required = run_setup(with_kernels, "build_csrc", **environment, HYLORA_REQUIRE_CUDA="1")
    assert required.returncode != 0
    assert "HYLORA_REQUIRE_CUDA is set, but: " in required.stderr and reason in required.stderr


@needs_gxx
def test_kernels_that_do_not_compile_are_an_error(with_kernels, nvcc):
    (with_kernels / "csrc" / "cuda" / "kernels.cu").write_text("no C++\n")
    done = run_setup(with_kernels, "build_csrc", CUDA_HOME=str(nvcc()))
    assert done.returncode != 0 and "can't be built: compiling failed" in done.stderr


def test_sanitizers_go_without(setup_py, nvcc, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_HOME", str(nvcc()))
    monkeypatch.setenv("HYLORA_REQUIRE_CUDA", "1")
    assert isinstance(setup_py.cuda_or_reason(True), setup_py.NoCuda)
    assert "a copy with sanitizers has none" in capsys.readouterr().err


# What the library asks for


def undefined(library: Path) -> list[str]:
    return [line.split()[-1] for line in tool("nm", "-D", "--undefined-only", library).splitlines()]


@pytest.mark.skipif(sys.platform != "linux", reason="looks into an ELF file")
def test_every_symbol_is_in_the_oldest_torch(library):
    """torch_symbols.txt is what torch 2.10.0's own libtorch_cpu.so exports of what we call."""
    asked = {symbol for symbol in undefined(library) if re.match("(aoti_)?torch_", symbol)}
    there = {line for line in SYMBOLS.read_text().splitlines() if line and line[0] != "#"}
    assert asked and sorted(asked - there) == []


@pytest.mark.skipif(sys.platform != "linux", reason="looks into an ELF file")
def test_nothing_of_cuda_is_asked_of_the_loader(library):
    others = [s for s in undefined(library) if not re.match("(aoti_)?torch_", s)]
    of_the_system = re.compile(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_|^_ITM_|^__gmon_start__$|^__cxa_")
    assert [symbol for symbol in others if not of_the_system.search(symbol)] == []
    assert not re.search(r"NEEDED.*(cuda|nvidia|c10)", tool("readelf", "-d", library))


LOAD = """
import sys, torch
torch.ops.load_library(sys.argv[1])
ops = torch.ops.hylora
print(ops.cuda_archs(), "|", ops.cuda_lacks(75))
print(*ops.cuda_layer_sizes(False, False, 1, 2048, 2048, 512, 32, 132, 90))
"""


def test_it_loads_where_there_is_no_cuda(library):
    """In a process of its own, in which no library of CUDA can be found."""
    environment = {k: v for k, v in os.environ.items() if k != "LD_LIBRARY_PATH"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, library],
        env=environment | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    archs, reason = done.stdout.splitlines()[0].split("|")
    served = "serves GPUs from sm_80 on, got sm_75"
    assert reason.strip() == served if archs.strip() else "no CUDA kernels" in reason
    columns, *_ = map(int, done.stdout.splitlines()[1].split())
    assert columns >= 512 + 32


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc here")
def test_where_there_is_nvcc_the_library_holds_every_architecture(library):
    wanted = os.environ.get("HYLORA_CUDA_ARCHS") or "80 86 89 90 100 120"
    if wanted == "none":
        pytest.skip("HYLORA_CUDA_ARCHS is none")
    assert set(torch.ops.hylora.cuda_archs().split()) <= set(wanted.split())
    assert torch.ops.hylora.cuda_archs(), torch.ops.hylora.cuda_lacks(90)
