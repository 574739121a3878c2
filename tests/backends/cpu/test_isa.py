"""Which instruction set the CPU kernels take: every level forced in a process of its own, and the
detection by itself on processors made up by a false cpuid.h."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hylora_kernels

ROOT = Path(hylora_kernels.__file__).resolve().parents[1]
LIBRARY = Path(os.environ.get("HYLORA_CSRC") or ROOT / "hylora_kernels" / "_csrc.so")
LEVELS = ["scalar", "avx2", "avx512", "avx512_bf16", "amx_bf16"]

needs_library = pytest.mark.skipif(not LIBRARY.is_file(), reason=f"{LIBRARY.name} isn't built")
needs_gxx = pytest.mark.skipif(
    shutil.which("g++") is None or not (ROOT / "csrc").is_dir(), reason="needs g++ and a checkout"
)

# Prints the level in use or what cpu_isa() raises, what another op does then, and every reason.
ASK = """
import sys, torch
torch.ops.load_library(sys.argv[1])
ops = torch.ops.hylora
torch.manual_seed(0)
try:
    print(ops.cpu_isa())
except Exception as error:
    print("refused:", str(error).splitlines()[0])
W = torch.randn(37, 70, dtype=torch.float64) / 70**0.5
x = torch.randn(3, 70, dtype=torch.float64)
error = 0.0
try:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        y = ops.cpu_linear(x.to(dtype), ops.cpu_pack(W.to(dtype)), None, 37, 0).double()
        exact = x.to(dtype).double() @ W.to(dtype).double().T
        error = max(error, float((y - exact).abs().max()) / torch.finfo(dtype).eps)
    print("computes, error", "small" if error < 16 else error)
except Exception as error:
    print("refused:", str(error).splitlines()[0])
for level in sys.argv[2:]:
    print(level, ops.cpu_isa_reason(level) or "ok", sep=": ")
"""


def ask(isa: str | None) -> list[str]:
    environment = {k: v for k, v in os.environ.items() if k != "HYLORA_ISA"}
    if isa is not None:
        environment["HYLORA_ISA"] = isa
    done = subprocess.run(
        [sys.executable, "-c", ASK, str(LIBRARY), *LEVELS],
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def unforced():
    return ask(None)


@needs_library
def test_the_highest_level_that_can_run_is_taken(unforced):
    isa, computes, *reasons = unforced
    able = [line.partition(": ")[0] for line in reasons if line.endswith(": ok")]
    assert able[0] == "scalar"
    assert isa == able[-1]
    assert computes == "computes, error small"


@needs_library
@pytest.mark.parametrize("level", LEVELS)
def test_a_forced_level_serves_or_says_why_not(level, unforced):
    reason = dict(line.split(": ", 1) for line in unforced[2:])[level]
    isa, computes, *_ = ask(level)
    if reason == "ok":
        assert (isa, computes) == (level, "computes, error small")
    else:
        print(f"{level}: {reason}")
        refusal = f"HYLORA_ISA={level} can't be served: {reason}"
        assert refusal in isa and isa.startswith("refused: ")
        assert refusal in computes and computes.startswith("refused: ")


@needs_library
def test_an_unknown_level_is_refused_by_every_op():
    isa, computes, *_ = ask("avx9")
    for line in (isa, computes):
        assert line.startswith("refused: ")
        assert f"HYLORA_ISA must be one of {', '.join(LEVELS)}, got 'avx9'" in line


# The detection by itself. A processor is a list of leaves: "leaf.subleaf=a,b,c,d", in hex.

FALSE_CPUID = """
#pragma once
#include <cstdio>
#include <cstdlib>
#include <cstring>
static inline int __get_cpuid_count(unsigned leaf, unsigned subleaf, unsigned* a, unsigned* b,
                                    unsigned* c, unsigned* d) {
  char key[32];
  std::snprintf(key, sizeof key, " %x.%x=", leaf, subleaf);
  const char* found = std::strstr(std::getenv("PROCESSOR"), key);
  return found && std::sscanf(found + std::strlen(key), "%x,%x,%x,%x", a, b, c, d) == 4;
}
"""
MAIN = """
#include "isa.h"
#include <cstdio>
#include <cstdlib>
using namespace hylora;
extern "C" long false_syscall(long, ...) {
  std::puts("asked for tiles");
  return std::getenv("NO_TILES") ? -1 : 0;
}
int main(int count, char**) {
  const IsaChoice& choice = isa_chosen();
  std::printf("chosen: %s\\n", choice.error ? choice.error : isa_name(choice.isa));
  for (int level = 0; count > 1 && level < isa_count; ++level) {
    const char* reason = isa_unavailable(Isa(level));
    std::printf("%s: %s\\n", isa_name(Isa(level)), reason ? reason : "ok");
  }
  std::printf("l2: %zu\\n", l2_bytes());
}
"""
FMA_F16C_AVX_OSXSAVE = 1 << 12 | 1 << 29 | 1 << 28 | 1 << 27
AVX2, AVX512 = 1 << 5, 1 << 16 | 1 << 17 | 1 << 30 | 1 << 31
AMX = 1 << 24 | 1 << 22
VNNI = 1 << 11
TILES = " 1d.0=1,0,0,0 1d.1=4002000,80040,10,0"
L2 = " 4.0=121,2c0003f,3f,0 4.1=143,3c0003f,7ff,0 4.2=0,0,0,0"  # L1d 48 KB, L2 2 MB


def processor(c1=FMA_F16C_AVX_OSXSAVE, b7=0, c7=0, d7=0, a7_1=0) -> str:
    return f" 1.0=0,0,{c1:x},0 7.0=1,{b7:x},{c7:x},{d7:x} 7.1={a7_1:x},0,0,0"


HASWELL = processor(b7=AVX2)
SKYLAKE_X = processor(b7=AVX2 | AVX512)
SAPPHIRE = processor(b7=AVX2 | AVX512, c7=VNNI, d7=AMX, a7_1=1 << 5) + TILES


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Compiles the detection with the false processor. XCR0 can't be told lies, so the asm that
    reads it is replaced by the number that SAVED gives."""
    folder = tmp_path_factory.mktemp("isa")
    (folder / "cpuid.h").write_text(FALSE_CPUID)
    (folder / "main.cpp").write_text(MAIN)
    source = (ROOT / "csrc/cpu/kernels/isa.cpp").read_text(encoding="utf-8")
    read = '__asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));'
    assert source.count(read) == 1
    told = 'high = 0, low = std::strtoul(std::getenv("SAVED"), nullptr, 16);'
    (folder / "isa.cpp").write_text(source.replace(read, told))
    (folder / "elsewhere.cpp").write_text(source.replace("__x86_64__", "__no_such_processor__"))
    made = {}

    def program(*flags: str, file="isa.cpp") -> Path:
        if (key := (file, *flags)) not in made:
            made[key] = folder / f"program{len(made)}"
            command = ["g++", "-std=c++17", "-fno-exceptions", "-fno-rtti", "-Wall", "-Wextra"]
            command += [
                "-Werror",
                f"-I{folder}",
                f"-I{ROOT / 'csrc/cpu/kernels'}",
            ]
            command += ["-Dsyscall=false_syscall", *flags, "main.cpp", file]
            subprocess.run([*command, "-o", str(made[key])], cwd=folder, check=True, timeout=300)
        return made[key]

    return program


def detect(program: Path, leaves: str, saved="600e7", every_level=True, **environment: str) -> dict:
    done = subprocess.run(
        [program, *(["all"] if every_level else [])],
        env={"PROCESSOR": leaves, "SAVED": saved, **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    lines = done.stdout.splitlines()
    found = dict(line.split(": ", 1) for line in lines if ": " in line)
    return found | {"asked": lines.count("asked for tiles")}


x86 = pytest.mark.skipif(
    not sys.platform.startswith("linux") or os.uname().machine != "x86_64", reason="x86-64 Linux"
)


# Name: (leaves, XCR0, the highest level that can run, why the next one can't).
PROCESSORS = {
    "all": (SAPPHIRE, "600e7", "amx_bf16", ""),
    "no tiles": (SAPPHIRE, "e7", "avx512_bf16", "the system does not save AMX tiles (XCR0)"),
    "no zmm": (SAPPHIRE, "7", "avx2", "the system does not save AVX-512 registers (XCR0)"),
    "no ymm": (SAPPHIRE, "3", "scalar", "the system does not save AVX registers (XCR0)"),
    "skylake": (SKYLAKE_X, "e7", "avx512", "this processor has no AVX512-BF16, AVX512-VNNI"),
    "bf16 alone": (
        processor(b7=AVX2 | AVX512, a7_1=1 << 5),
        "e7",
        "avx512",
        "this processor has no AVX512-VNNI",
    ),
    "haswell": (
        HASWELL,
        "7",
        "avx2",
        "this processor has no AVX-512F, AVX-512BW, AVX-512DQ, AVX-512VL",
    ),
    "AVX-512 F alone": (
        processor(b7=AVX2 | 1 << 16),
        "e7",
        "avx2",
        "this processor has no AVX-512BW, AVX-512DQ, AVX-512VL",
    ),
    "no FMA": (
        processor(c1=FMA_F16C_AVX_OSXSAVE & ~(1 << 12), b7=AVX2),
        "7",
        "scalar",
        "this processor has no FMA",
    ),
    "XSAVE switched off": (
        processor(c1=FMA_F16C_AVX_OSXSAVE & ~(1 << 27), b7=AVX2 | AVX512),
        "600e7",
        "scalar",
        "the system does not save AVX registers (XCR0)",
    ),
    "old": (" ", "0", "scalar", "this processor has no AVX, AVX2, FMA, F16C"),
    "tiles of another shape": (
        SAPPHIRE.replace("80040,10", "80020,8"),
        "600e7",
        "avx512_bf16",
        "this processor's AMX tiles are not eight of 16 rows of 64 bytes",
    ),
}


@needs_gxx
@x86
@pytest.mark.parametrize("leaves, saved, chosen, reason", PROCESSORS.values(), ids=PROCESSORS)
def test_levels_of_processors(compiled, leaves, saved, chosen, reason):
    found = detect(compiled(), leaves, saved)
    assert found["chosen"] == chosen
    top = LEVELS.index(chosen) + 1
    assert [level for level in LEVELS if found[level] == "ok"] == LEVELS[:top]
    assert not reason or found[LEVELS[top]] == reason


@needs_gxx
@x86
def test_tiles_are_asked_for_once_and_only_where_wanted(compiled):
    program = compiled()
    assert detect(program, SAPPHIRE)["asked"] == 1
    assert detect(program, SKYLAKE_X)["asked"] == 0
    forced = detect(program, SAPPHIRE, every_level=False, HYLORA_ISA="avx512")
    assert (forced["chosen"], forced["asked"]) == ("avx512", 0)
    refused = detect(program, SAPPHIRE, NO_TILES="1")
    assert (refused["chosen"], refused["asked"]) == ("avx512_bf16", 1)
    assert refused["amx_bf16"] == "the system refuses this process the use of AMX tiles"


@needs_gxx
@x86
def test_a_forced_level_that_is_missing(compiled):
    program = compiled()
    assert detect(program, HASWELL, HYLORA_ISA="")["chosen"] == "avx2"
    assert detect(program, HASWELL, HYLORA_ISA="scalar")["chosen"] == "scalar"
    lacking = "HYLORA_ISA=amx_bf16 can't be served: this processor has no AVX-512F"
    assert detect(program, HASWELL, HYLORA_ISA="amx_bf16")["chosen"].startswith(lacking)
    long = detect(program, HASWELL, HYLORA_ISA="x" * 1000)["chosen"]
    assert long.startswith(f"HYLORA_ISA must be one of {', '.join(LEVELS)}, got 'xxx")


@needs_gxx
@x86
def test_files_that_were_left_out(compiled):
    found = detect(compiled("-DHYLORA_NO_AVX512_BF16", "-DHYLORA_NO_AMX_BF16"), SAPPHIRE)
    assert found["chosen"] == "avx512"
    reason = "not compiled in: the compiler did not know its instructions"
    assert found["avx512_bf16"] == found["amx_bf16"] == reason


@needs_gxx
def test_other_processors_run_the_scalar_level(compiled):
    found = detect(compiled(file="elsewhere.cpp"), SAPPHIRE)
    assert found["chosen"] == "scalar"
    assert {found[level] for level in LEVELS[1:]} == {"this processor is not x86-64"}


@needs_gxx
@x86
def test_the_l2_cache(compiled):
    program = compiled()
    assert detect(program, SAPPHIRE + L2)["l2"] == str(2 << 20)
    assert detect(program, HASWELL + L2.replace(" 4.", " 8000001d."))["l2"] == str(2 << 20)
    assert int(detect(program, HASWELL)["l2"]) >= 128 << 10  # the system's word, or 1 MB
