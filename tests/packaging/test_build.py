"""setup.py: the flags of each file, the package that is built without a library, the reason that it
then gives, and the contents of the library. Most tests compile a small stand-in for csrc/."""

from __future__ import annotations

import re
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
from helpers.building import (
    LEVELS,
    ROOT,
    a_checkout,  # noqa: F401
    a_setup_py,  # noqa: F401
    needs_gxx,
    run_python_in,
    run_setup,
    the_library,  # noqa: F401
    tool,
)

from hylora_kernels.backends.shared import library as loader

if not (ROOT / "setup.py").is_file():
    pytest.skip("needs a checkout", allow_module_level=True)


def only_wheel(folder: Path) -> tuple[str, list[str]]:
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel.name, zipfile.ZipFile(wheel).namelist()


def stand_in(folder: Path, script: str) -> str:
    """A compiler: `script`, then g++."""
    path = folder / "cxx"
    path.write_text(f'#!/bin/sh\n{script}\nexec g++ "$@"\n')
    path.chmod(0o755)
    return str(path)


# What is made


def test_without_a_compiler_the_package_is_built_and_says_so_once(checkout):
    stale = checkout / "build" / "lib" / "hylora_kernels" / "_csrc.so"
    stale.parent.mkdir(parents=True)
    stale.write_text("of older sources")
    done = run_setup(checkout, "bdist_wheel", CXX="/no/such/compiler")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("_csrc.so can't be built: the compiler that CXX names, '/no/such") == 1
    assert done.stderr.count("The eager backend will serve.") == 1
    name, files = only_wheel(checkout)
    assert name.endswith("-py3-none-any.whl")
    assert not [file for file in files if file.endswith(".so")]


def in_which_python_runs(code: str, checkout: Path) -> dict[str, str]:
    """An environment in which every Python process runs `code` first."""
    hook = checkout.parent / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": str(hook)}


def no_torch(checkout: Path) -> dict[str, str]:
    """As in pip's isolated build."""
    code = """import importlib.util as util
find = util.find_spec
util.find_spec = lambda name, *more: None if name == "torch" else find(name, *more)
"""
    return in_which_python_runs(code, checkout)


def no_ninja(checkout: Path) -> dict[str, str]:
    code = """import shutil
find = shutil.which
shutil.which = lambda name, **more: None if name == "ninja" else find(name, **more)
"""
    return in_which_python_runs(code, checkout)


def no_compiler(checkout: Path) -> dict[str, str]:
    return {"CXX": "/no/such/compiler"}


def sources_with_an_error(checkout: Path) -> dict[str, str]:
    (checkout / "csrc" / "cpu" / "bindings.cpp").write_text("no C++\n")
    return {}


WHY_NO_LIBRARY = {
    no_torch: "torch wasn't there while building: install torch first",
    no_ninja: "ninja wasn't there while building",
    no_compiler: "the compiler that CXX names, '/no/such/compiler', was not found",
    sources_with_an_error: "compiling failed: csrc/cpu/bindings.cpp:1:1: error: ",
}

SAY_WHY = """
import logging, sys
logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stdout)
import torch, hylora_kernels
from hylora_kernels.machine.info import info
print(*(f"{name}: {text}" for name, text in info().rows()), sep="\\n")
print("available cpu:", hylora_kernels.available_backends()["cpu"])
print("available cuda:", hylora_kernels.available_backends()["cuda"])
layer = hylora_kernels.SVDLoRALinear(64, 64, 16).eval()
hylora_kernels.optimize_for_inference(layer)
"""


@needs_gxx
@pytest.mark.parametrize("cause", WHY_NO_LIBRARY, ids=lambda cause: cause.__name__)
def test_an_installed_package_says_why_it_has_no_library(checkout, tmp_path, cause):
    """From the build into the wheel, from the wheel into `hylora info`, available_backends() and
    the log of optimize_for_inference."""
    reason = WHY_NO_LIBRARY[cause]
    shutil.rmtree(checkout / "hylora_kernels")
    left_out = shutil.ignore_patterns("__pycache__", "_csrc*.so", "_build.json")
    shutil.copytree(ROOT / "hylora_kernels", checkout / "hylora_kernels", ignore=left_out)
    built = run_setup(checkout, "bdist_wheel", **cause(checkout))
    assert built.returncode == 0, built.stderr
    assert built.stderr.count(f"_csrc.so can't be built: {reason}") == 1
    name, files = only_wheel(checkout)
    assert name.endswith("-py3-none-any.whl")
    copied = {
        p.relative_to(checkout).as_posix() for p in (checkout / "hylora_kernels").rglob("*.*")
    }
    assert copied <= set(files), "data files are in it as well"
    zipfile.ZipFile(checkout / "dist" / name).extractall(tmp_path / "installed")
    said = run_python_in(tmp_path / "installed", SAY_WHY).splitlines()
    told = f"_csrc.so was not built when the package was installed: {reason}"
    for row in ("backend cpu: ", "backend cuda: ", "cuda code: ", "available cpu: "):
        assert [line for line in said if line.startswith(row + told)], row
    logged = [line for line in said if line.startswith("optimize_for_inference: ")]
    assert len(logged) == 1 and f"cpu: {told}" in logged[0]


@needs_gxx
def test_a_library_takes_the_place_of_the_reason_why_there_was_none(checkout):
    note = checkout / "hylora_kernels" / "_build.json"
    assert run_setup(checkout, "build_csrc", CXX="/no/such/compiler").returncode == 0
    assert note.is_file()
    assert run_setup(checkout, "build_csrc").returncode == 0
    assert not note.exists()


@pytest.mark.parametrize("note", ["", "[]", "{}", None])
def test_a_missing_or_broken_note_is_said(tmp_path, monkeypatch, note):
    monkeypatch.setattr(loader, "BUILD_NOTE", tmp_path / "_build.json")
    if note is not None:
        loader.BUILD_NOTE.write_text(note)
    assert "was not built" in loader._why_not_built()
    assert f"no reason is recorded in {tmp_path}" in loader._why_not_built()


@pytest.mark.parametrize("command", ["build_csrc", "build_ext"])
def test_a_library_that_is_required_is_an_error(checkout, command):
    done = run_setup(checkout, command, CXX="/no/such/compiler", HYLORA_REQUIRE_CSRC="1")
    assert done.returncode != 0
    assert "_csrc.so can't be built" in done.stderr


def test_reasons_for_no_library(setup_py, monkeypatch):
    monkeypatch.setattr(setup_py.shutil, "which", lambda *_, **__: None)
    with pytest.raises(setup_py.CannotBuild, match=r"no C\+\+ compiler"):
        setup_py.find_compiler()
    with pytest.raises(setup_py.CannotBuild, match="ninja wasn't there"):
        setup_py.find_ninja()
    monkeypatch.setattr(setup_py.importlib.metadata, "version", lambda _: "2.9.1+cpu")
    with pytest.raises(setup_py.CannotBuild, match=r"2\.9\.1\+cpu is older than 2\.10"):
        setup_py.find_torch()
    monkeypatch.setattr(setup_py.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(setup_py.CannotBuild, match="torch wasn't there while building"):
        setup_py.find_torch()


@needs_gxx
def test_a_wheel_holds_the_library_and_fits_every_python(checkout):
    done = run_setup(checkout, "bdist_wheel", HYLORA_REQUIRE_CSRC="1")
    assert done.returncode == 0, done.stderr
    name, files = only_wheel(checkout)
    assert "-py3-none-" in name and not name.endswith("-any.whl")
    assert [file for file in files if file.endswith(".so")] == ["hylora_kernels/_csrc.so"]


@needs_gxx
def test_only_what_changed_is_compiled_again(checkout):
    assert run_setup(checkout, "build_csrc").returncode == 0
    assert (checkout / "hylora_kernels" / "_csrc.so").is_file()
    assert "c++" not in run_setup(checkout, "build_csrc").stdout
    (checkout / "csrc" / "cpu" / "call.h").write_text("#pragma once\n#define CHANGED\n")
    compiled = re.findall(r"c\+\+ (\S+)", run_setup(checkout, "build_csrc").stdout)
    assert compiled == ["csrc/cpu/bindings.cpp"]


@needs_gxx
def test_sources_that_do_not_compile(checkout):
    assert run_setup(checkout, "build_csrc").returncode == 0
    library = checkout / "hylora_kernels" / "_csrc.so"
    (checkout / "csrc" / "cpu" / "bindings.cpp").write_text("no C++\n")
    developer = run_setup(checkout, "build_csrc")
    assert developer.returncode != 0 and "can't be built: compiling failed" in developer.stderr
    assert library.is_file()  # the last good one, while its author mends the file
    user = run_setup(checkout, "build_ext", "--inplace")
    assert user.returncode == 0 and "The eager backend will serve." in user.stderr
    assert not library.exists()


@needs_gxx
def test_the_instrumented_copy_lies_elsewhere(checkout):
    done = run_setup(checkout, "build_csrc", HYLORA_SANITIZE="1")
    if "cannot find" in done.stdout + done.stderr:
        pytest.skip("this g++ has no library for its sanitizers")
    assert done.returncode == 0, done.stderr
    library = checkout / "build" / "sanitized" / "_csrc.so"
    assert b"__asan_init" in library.read_bytes()
    assert not (checkout / "hylora_kernels" / "_csrc.so").exists()


# With what flags


def test_every_instruction_set_has_its_file(setup_py):
    assert tuple(setup_py.ISA) == LEVELS
    assert [
        n for n in ("scalar", *LEVELS) if not (ROOT / f"csrc/cpu/kernels/{n}.cpp").is_file()
    ] == []


@needs_gxx
def test_flags_of_every_file(setup_py):
    plan = setup_py.flags_by_source(["g++"])
    if not setup_py.is_x86(["g++"]):
        pytest.skip("no x86 here")
    hints = {"-mprfchw"}  # a prefetch, which every processor that has AMX takes
    machine = {s: {f for f in flags if f.startswith("-m")} - hints for s, flags in plan.items()}
    avx2 = {"-mavx2", "-mfma", "-mf16c"}
    avx512 = avx2 | {"-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"}
    wanted = {"csrc/cpu/kernels/avx2.cpp": avx2, "csrc/cpu/kernels/avx512.cpp": avx512}
    bf16 = avx512 | {"-mavx512bf16", "-mavx512vnni"}
    wanted["csrc/cpu/kernels/avx512_bf16.cpp"] = bf16
    wanted["csrc/cpu/kernels/amx_bf16.cpp"] = bf16 | {"-mamx-tile", "-mamx-bf16"}
    assert machine == {source: wanted.get(source, set()) for source in plan}
    assert "-O2" in plan["csrc/cpu/bindings.cpp"] and "-O3" in plan["csrc/cpu/kernels/scalar.cpp"]
    rules = setup_py.ninja_file("build/csrc", False)
    assert "native" not in rules and "-ffast-math" not in rules


@needs_gxx
def test_a_compiler_that_does_not_know_a_flag_leaves_that_file_out(setup_py, tmp_path, capsys):
    old = stand_in(tmp_path, 'case "$*" in *-mamx-bf16*) exit 1;; esac')
    if not setup_py.is_x86([old]):
        pytest.skip("no x86 here")
    plan = setup_py.flags_by_source([old])
    assert (
        "csrc/cpu/kernels/amx_bf16.cpp" not in plan and "csrc/cpu/kernels/avx512_bf16.cpp" in plan
    )
    assert all("-DHYLORA_NO_AMX_BF16" in flags for flags in plan.values())
    assert "leaves out amx_bf16\n" in capsys.readouterr().err


@needs_gxx
def test_only_the_instruction_sets_that_are_asked_for(setup_py, monkeypatch):
    monkeypatch.setenv("HYLORA_ISAS", "avx2")
    plan = setup_py.flags_by_source(["g++"])
    if not setup_py.is_x86(["g++"]):
        pytest.skip("no x86 here")
    assert "csrc/cpu/kernels/avx2.cpp" in plan and "csrc/cpu/kernels/avx512.cpp" not in plan
    assert all("-DHYLORA_NO_AVX512" in flags for flags in plan.values())
    monkeypatch.setenv("HYLORA_ISAS", "avx2 sse9")
    with pytest.raises(SystemExit, match=r"HYLORA_ISAS may name avx2, .*, got 'sse9'"):
        setup_py.flags_by_source(["g++"])


@needs_gxx
def test_other_processors_get_no_machine_flags(setup_py, tmp_path):
    arm = stand_in(tmp_path, 'if [ "$1" = -dumpmachine ]; then echo aarch64-linux-gnu; exit; fi')
    plan = setup_py.flags_by_source([arm])
    assert {f"csrc/cpu/kernels/{level}.cpp" for level in LEVELS} <= set(plan)
    assert not [f for flags in plan.values() for f in flags if f.startswith(("-m", "-DHYLORA_NO"))]


def test_nothing_is_compiled_for_the_machine_at_hand():
    files = ["setup.py", "Makefile", "pyproject.toml"]
    for path in [*map(ROOT.joinpath, files), *(ROOT / "csrc").rglob("*.*")]:
        assert not re.search(r"(march|mtune|mcpu)=\w", path.read_text(encoding="utf-8")), path


def included(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*([<"][^>"]+)', path.read_text(encoding="utf-8"), re.M)


BASELINE_FILES = ("isa.cpp", "panels.cpp")
KERNEL_FILES = [
    p for p in sorted((ROOT / "csrc/cpu/kernels").glob("*.*")) if p.name not in BASELINE_FILES
]


@pytest.mark.parametrize("path", [ROOT / "csrc/cpu/call.h", *KERNEL_FILES], ids=lambda p: p.name)
def test_kernels_include_no_library_code(path):
    """An inline function of a library header would be compiled for the file's instruction set, and
    the linker might keep that copy for everyone."""
    project = {p.name for p in (ROOT / "csrc").rglob("*.h")}
    for name in included(path):
        plain = name in {"<cstdint", "<cstddef"} or (name[0] == "<" and name.endswith("intrin.h"))
        assert plain or (name[0] == '"' and Path(name[1:]).name in project), name


# What the finished library holds


def objects(name: str) -> Path:
    path = ROOT / "build" / "csrc" / f"{name}.cpp.o"
    if not path.is_file():
        pytest.skip(f"{path.name} isn't built here")
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="looks into an ELF file")
def test_the_library_shows_nothing_and_needs_only_torch(library):
    assert tool("nm", "-D", "--defined-only", library).split() == []
    dynamic = tool("readelf", "-d", library)
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
    needed = set(re.findall(r"NEEDED.*\[(\w+)", dynamic))
    assert "libtorch_cpu" in needed
    assert needed <= {"libtorch_cpu", "libstdc", "libgcc_s", "libm", "libc", "ld"}


def test_the_library_holds_no_path_of_the_machine_it_was_made_on(library):
    content = library.read_bytes()
    places = (str(ROOT), str(Path.home()), sys.prefix, sys.base_prefix, "/site-packages/")
    assert [place for place in places if place.encode() in content] == []


@pytest.mark.parametrize(
    "name", ["cpu/kernels/scalar", *(f"cpu/kernels/{level}" for level in LEVELS)]
)
def test_no_function_of_a_kernel_file_can_replace_another_files(name):
    """A weak symbol is an inline function, of which the linker keeps any one copy."""
    symbols = tool("nm", "-C", "--defined-only", objects(name)).splitlines()
    assert [line for line in symbols if re.search(r" [VWuvw] ", line)] == []


EVEX = r"%zmm|%k[1-7]|%[xy]mm(1[6-9]|2\d|3[01])"
TILES = r"%tmm|\t(ld|st)tilecfg|\ttile"
BASELINE = rf"\tv[a-z]|%ymm|{EVEX}|{TILES}"
TOO_NEW = {
    "cpu/bindings": BASELINE,
    "cpu/kernels/isa": BASELINE,
    "cpu/kernels/scalar": BASELINE,
    "cpu/kernels/avx2": f"{EVEX}|{TILES}",
    "cpu/kernels/avx512": rf"\tv(dpbf16ps|dpwssds?|dpbusds?|cvtne2?ps2bf16)|{TILES}",
    "cpu/kernels/avx512_bf16": TILES,
}


@needs_gxx
@pytest.mark.parametrize("name", TOO_NEW)
def test_no_instruction_newer_than_the_files_level(setup_py, name):
    if not setup_py.is_x86(["g++"]):
        pytest.skip("no x86 here")
    code = tool("objdump", "-d", "--no-show-raw-insn", objects(name))
    assert [line for line in code.splitlines() if re.search(TOO_NEW[name], line)][:5] == []
