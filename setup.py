"""Builds hylora_kernels/_csrc.so from csrc/ with ninja; everything else stands in pyproject.toml.

    pip install --no-build-isolation .      builds the library. If that is impossible, the package
                                            is installed without it: the eager backend serves, and
                                            hylora_kernels/_build.json says why
    python setup.py build_csrc              builds the library in place, only the files that
                                            changed; sources that don't compile are an error

The library is plain C++ on LibTorch's stable ABI and has no Python symbols, so one file serves
every Python version and every torch from 2.10 on. Each file of csrc/cpu/kernels/ named in ISA is
compiled for that instruction set and nothing newer, all others for the compiler's baseline. With
nvcc, the CUDA kernels are linked into the same file together with a static CUDA runtime: the
library loads on machines that have no CUDA.

    CXX                     the compiler, with arguments if need be (default: g++, clang++ or c++)
    HYLORA_CXXFLAGS         flags added to each of its compilations and to the link
    HYLORA_ISAS             instruction sets to compile kernels for beside the baseline, e.g. "avx2"
                            (default: all that the compiler knows)
    HYLORA_REQUIRE_CSRC=1   fail if the library can't be built
    CUDA_HOME               folder of the CUDA toolkit (default: nvcc on PATH, or /usr/local/cuda)
    HYLORA_CUDA_ARCHS       GPUs to compile for, e.g. "80 90" (default: CUDA_ARCHS below), or "none"
    HYLORA_REQUIRE_CUDA=1   fail if the CUDA kernels can't be built
    HYLORA_SANITIZE=1       build_csrc builds build/sanitized/_csrc.so and nothing else, with
                            AddressSanitizer and UndefinedBehaviorSanitizer; HYLORA_CSRC=<path>
                            loads it
    MAX_JOBS                number of parallel compilations (default: ninja's)
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import ClassVar, NamedTuple

from setuptools import Command, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
LIBRARY = Path("hylora_kernels", "_csrc.so")
BUILD_NOTE = "_build.json"  # beside the library's place when there is no library
TORCH_TARGET = (2, 10)  # the oldest torch that loads the library

# Instruction set -> the flags of its file, and an instruction that needs them. A file is left out
# if the compiler or its assembler doesn't know them; a macro tells isa.cpp, which gives that as its
# reason at run time.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *AVX2]
AVX512_BF16 = [*AVX512, "-mavx512bf16", "-mavx512vnni"]
AMX_BF16 = [*AVX512_BF16, "-mamx-tile", "-mamx-bf16", "-mprfchw"]
ISA = {
    "avx2": (AVX2, "vfmadd231ps %ymm0, %ymm0, %ymm0"),
    "avx512": (AVX512, "vpermw %zmm0, %zmm0, %zmm0"),
    "avx512_bf16": (AVX512_BF16, "vdpbf16ps %zmm0, %zmm0, %zmm0"),
    "amx_bf16": (AMX_BF16, "tdpbf16ps %tmm0, %tmm1, %tmm2"),
}
BINDING_FLAGS = ["-O2"]
# g++ 12 warns of the undefined vectors in its own intrinsics (GCC bug 105593).
KERNEL_FLAGS = ["-O3", "-fno-exceptions", "-fno-rtti", "-ffp-contract=fast"]
KERNEL_FLAGS += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]
COMMON_FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden"]
# Kernels share one signature, and some don't use all of it. No vector is passed between files, so
# the ABI of vector arguments (psabi) doesn't matter.
COMMON_FLAGS += ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-psabi"]
# Other GPUs run the code of an older minor version (sm_103 that of sm_100), or the PTX of the
# oldest architecture, which is included and which their driver compiles.
CUDA_ARCHS = (80, 86, 89, 90, 100, 120)
LEAST_ARCH = 80  # bf16 tensor cores, asynchronous copies
CUDA_FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
CUDA_FLAGS += ["-Xfatbin", "-compress-all"]  # a quarter of the size
# Checks are calls, at -Og: the kernels are so long that inline checks take ten minutes to compile,
# and -O1 takes 166 CPU seconds instead of 126 for code that is no faster.
SANITIZE_FLAGS = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g1", "-Og"]
SANITIZE_FLAGS += ["--param", "asan-instrumentation-with-call-threshold=0"]
# vptr needs RTTI; null and object-size find only what crashes or what AddressSanitizer finds too.
SANITIZE_FLAGS += ["-fno-sanitize=vptr,null,object-size", "-fno-sanitize-recover=all"]


class CannotBuild(Exception):
    """The reason why there is no library, in words for the user."""


class DoesNotCompile(CannotBuild):
    """The tools are there, but the sources didn't compile."""


class NoCuda(Exception):
    """The reason why the library has no CUDA kernels, in words for the user. It is compiled into
    the library, so it names no path of the machine that built it."""


def is_set(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def find_compiler() -> list[str]:
    if os.name == "nt":
        raise CannotBuild("it is compiled with g++ or clang++, on Linux and macOS only")
    command = shlex.split(os.environ.get("CXX", ""))
    if not command:
        found = [name for name in ("g++", "clang++", "c++") if shutil.which(name)]
        if not found:
            raise CannotBuild("no C++ compiler (g++ or clang++) was found")
        command = found[:1]
    if not shutil.which(command[0]):
        raise CannotBuild(f"the compiler that CXX names, {command[0]!r}, was not found")
    return command


def find_torch() -> Path:
    """The folder that torch is installed in, found without importing it, which takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise CannotBuild(
            "torch wasn't there while building: install torch first, then this package with pip "
            "install --no-build-isolation"
        )
    version = importlib.metadata.version("torch")
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < TORCH_TARGET:
        raise CannotBuild(f"torch {version} is older than {'.'.join(map(str, TORCH_TARGET))}")
    return Path(spec.submodule_search_locations[0])


def find_ninja() -> str:
    """The ninja of this Python environment, active or not, or else the system's."""
    beside = shutil.which("ninja", path=os.path.dirname(sys.executable))
    found = beside or shutil.which("ninja")
    if found is None:
        raise CannotBuild("ninja wasn't there while building: pip install ninja")
    return found


def is_x86(cxx: list[str]) -> bool:
    machine = subprocess.run([*cxx, "-dumpmachine"], capture_output=True, text=True).stdout
    return machine.startswith(("x86_64", "amd64"))


def compiler_supports(cxx: list[str], flags: list[str], instruction: str) -> bool:
    """True if the compiler accepts these flags and its assembler this instruction."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(f'void probe() {{ __asm__ volatile("{instruction}"); }}\n')
        command = [*cxx, *flags, "-c", str(source), "-o", str(Path(folder, "probe.o"))]
        return subprocess.run(command, capture_output=True).returncode == 0


def wanted_isas() -> list[str]:
    """The names in HYLORA_ISAS; all of ISA where it isn't set."""
    words = os.environ.get("HYLORA_ISAS", " ".join(ISA)).split()
    if unknown := [word for word in words if word not in ISA]:
        raise SystemExit(f"HYLORA_ISAS may name {', '.join(ISA)}, got {' '.join(unknown)!r}")
    return words


def sources(suffix: str) -> list[str]:
    """The files of csrc/ with this suffix, relative to the root."""
    return sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob(f"csrc/**/*.{suffix}"))


def flags_by_source(cxx: list[str]) -> dict[str, list[str]]:
    """C++ file, relative to the root -> its flags, for each file that this compiler can compile."""
    found = sources("cpp")
    if not found:
        raise CannotBuild("there are no sources in csrc/")
    x86, wanted = is_x86(cxx), wanted_isas()
    files = {}
    for source in found:
        name = Path(source).stem
        if not source.startswith("csrc/cpu/kernels/"):
            files[source] = BINDING_FLAGS
        elif name not in ISA or not x86:  # without x86 these files compile to nothing
            files[source] = KERNEL_FLAGS
        elif name in wanted and compiler_supports(cxx, *ISA[name]):
            files[source] = KERNEL_FLAGS + ISA[name][0]
    left_out = [name for name in ISA if f"csrc/cpu/kernels/{name}.cpp" not in files]
    if unknown := [name for name in left_out if name in wanted]:
        print(f"hylora_kernels: {cxx[0]} leaves out {', '.join(unknown)}", file=sys.stderr)
    macros = [f"-DHYLORA_NO_{name.upper()}" for name in left_out]
    return {source: flags + macros for source, flags in files.items()}


class Cuda(NamedTuple):
    """The CUDA toolkit to compile with.

    nvcc: its path. libraries: the folder of libcudart_static.a. archs: 90 means sm_90.
    """

    nvcc: str
    libraries: str
    archs: list[int]

    @property
    def flags(self) -> list[str]:
        """All machine code is compiled from the PTX of the oldest architecture: nvcc's front end
        takes 15 of the 23 seconds of one architecture, and no kernel needs newer PTX."""
        oldest = f"compute_{LEAST_ARCH}"
        codes = ",".join([oldest, *(f"sm_{arch}" for arch in self.archs)])
        threads = os.environ.get("MAX_JOBS") or "0"  # 0: one a core
        return [*CUDA_FLAGS, "--threads", threads, f"-gencode=arch={oldest},code=[{codes}]"]


def wanted_archs() -> list[int]:
    """The numbers in HYLORA_CUDA_ARCHS, ascending."""
    given = os.environ.get("HYLORA_CUDA_ARCHS", "")
    words = re.split(r"[\s,;]+", given.strip())
    if words == ["none"]:
        raise NoCuda("HYLORA_CUDA_ARCHS was none when the library was built")
    if words == [""]:
        return list(CUDA_ARCHS)
    if not all(re.fullmatch(r"\d{2,3}", word) and int(word) >= LEAST_ARCH for word in words):
        raise SystemExit(
            f'HYLORA_CUDA_ARCHS must be "none" or numbers from {LEAST_ARCH} on as in "80 90", got '
            f"{given!r}"
        )
    return sorted({int(word) for word in words})


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    places = [Path(home, "bin")] if home else [None, Path("/usr/local/cuda/bin")]
    found = filter(None, (shutil.which("nvcc", path=place) for place in places))
    nvcc = next(found, None)
    if nvcc is None:
        raise NoCuda("no nvcc was found when the library was built")
    return nvcc


def find_cuda() -> Cuda:
    """Raises NoCuda if the kernels can't be compiled or aren't wanted."""
    wanted, nvcc = wanted_archs(), find_nvcc()

    def ask(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run([nvcc, *words], capture_output=True, text=True)

    known = set(map(int, re.findall(r"sm_(\d+)", ask("--list-gpu-code").stdout)))
    archs = [arch for arch in wanted if arch in known]
    left_out = ", ".join(f"sm_{arch}" for arch in wanted if arch not in known)
    if not archs:
        raise NoCuda(f"the nvcc that built the library knew none of {left_out}")
    if left_out:
        print(f"hylora_kernels: {nvcc} leaves out {left_out}", file=sys.stderr)
    named = re.findall(r'"-L([^"]+)"', ask("--dryrun", "-x", "cu", "-c", os.devnull).stderr)
    libraries = [folder for folder in named if Path(folder, "libcudart_static.a").is_file()]
    if not libraries:
        raise NoCuda("libcudart_static.a wasn't there when the library was built")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cu")
        source.write_text("#include <cstdint>\n__global__ void probe() {}\n")
        probe = ask("-std=c++17", "-cubin", f"-arch=sm_{archs[0]}", "-o", os.devnull, str(source))
    if probe.returncode != 0:
        print(probe.stderr.strip(), file=sys.stderr)
        raise NoCuda("nvcc didn't accept the C++ compiler when the library was built")
    return Cuda(nvcc, libraries[0], archs)


def cuda_or_reason(sanitize: bool) -> Cuda | NoCuda:
    """The toolkit that compiles the kernels, or the reason why there will be none, printed once.
    Without the kernels HYLORA_REQUIRE_CUDA is an error."""
    try:
        if sanitize:
            raise NoCuda("a copy with sanitizers has none")
        return find_cuda()
    except NoCuda as reason:
        if not sanitize and is_set("HYLORA_REQUIRE_CUDA"):
            raise SystemExit(f"HYLORA_REQUIRE_CUDA is set, but: {reason}") from None
        print(f"hylora_kernels: no CUDA kernels: {reason}", file=sys.stderr)
        return reason


def cuda_macros(cuda: Cuda | NoCuda) -> list[str]:
    """The macros that tell csrc/cuda/bindings.cpp which machine code the library holds."""
    if isinstance(cuda, NoCuda):
        return [f'-DHYLORA_NO_CUDA="{cuda}"']
    return [f'-DHYLORA_CUDA_ARCHS="{" ".join(map(str, cuda.archs))}"']


def ninja_command(words: list[str]) -> str:
    """A command as build.ninja spells it: words quoted for the shell, $ doubled for ninja."""
    return " ".join(shlex.quote(word) for word in words).replace("$", "$$")


def ninja_path(name: str) -> str:
    """A path as a build line of build.ninja spells it."""
    return name.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_file(folder: str, sanitize: bool) -> str:
    """The text of the build.ninja that makes folder/_csrc.so; paths are relative to the root.

    libtorch_cpu is the only part of torch that is linked, and by name: torch has loaded it before
    it loads the library, so no folder of this machine is written into the library."""
    cxx, torch = find_compiler(), find_torch()
    target = "0x{:02x}{:02x}{}".format(*TORCH_TARGET, "0" * 12)
    extra = SANITIZE_FLAGS if sanitize else []
    extra = extra + shlex.split(os.environ.get("HYLORA_CXXFLAGS", ""))
    include = torch / "include"
    common = [*COMMON_FLAGS, f"-DTORCH_TARGET_VERSION={target}", "-Icsrc"]
    common += ["-isystem", str(include), f"-ffile-prefix-map={include}=torch"]
    link = ["-shared", f"-L{torch / 'lib'}", "-ltorch_cpu"]
    if sys.platform.startswith("linux"):
        link += [f"-Wl,--version-script={folder}/nothing.map"]
        link += [] if sanitize else ["-Wl,-z,defs"]  # a missing function is the linker's error
    commands = {"cxx": [*cxx, *common]}
    builds = [("cxx", source, flags + extra) for source, flags in flags_by_source(cxx).items()]
    if kernels := sources("cu"):
        cuda = cuda_or_reason(sanitize)
        binding = "csrc/cuda/bindings.cpp"
        builds = [(r, s, f + cuda_macros(cuda) if s == binding else f) for r, s, f in builds]
        if isinstance(cuda, Cuda):
            commands["nvcc"] = [cuda.nvcc, *cuda.flags, "-Icsrc"]
            builds = [*(("nvcc", source, []) for source in kernels), *builds]
            link += [f"-L{cuda.libraries}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    commands["link"] = [*cxx, *extra]
    return ninja_lines(folder, commands, builds, link)


def ninja_lines(
    folder: str, commands: dict[str, list[str]], builds: list[tuple], libraries: list[str]
) -> str:
    """commands: rule -> the command it runs. builds: (rule, source, flags of this file)."""
    lines = ["ninja_required_version = 1.5", f"builddir = {ninja_path(folder)}"]
    for rule in sorted({rule for rule, _, _ in builds}):
        lines += [
            f"rule {rule}",
            f"  command = {ninja_command(commands[rule])} $flags -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            f"  description = {rule.replace('cxx', 'c++')} $in",
        ]
    lines += [
        "rule link",
        f"  command = {ninja_command(commands['link'])} $in {ninja_command(libraries)} -o $out",
        "  description = link $out",
    ]
    objects = []
    for rule, source, flags in builds:
        objects.append(ninja_path(f"{folder}/{source.removeprefix('csrc/')}.o"))
        lines += [
            f"build {objects[-1]}: {rule} {ninja_path(source)}",
            f"  flags = {ninja_command(flags)}",
        ]
    lines.append(f"build {ninja_path(f'{folder}/_csrc.so')}: link {' '.join(objects)}")
    return "\n".join([*lines, ""])


def compile_csrc(sanitize: bool = False) -> Path:
    """Bring build/csrc/_csrc.so (build/sanitized/_csrc.so) up to date; its path from the root."""
    folder = Path("build", "sanitized" if sanitize else "csrc")
    ninja, rules = find_ninja(), ninja_file(folder.as_posix(), sanitize)
    (ROOT / folder).mkdir(parents=True, exist_ok=True)
    (ROOT / folder / "build.ninja").write_text(rules)
    # The library exports no symbol: its ops register themselves when it is loaded.
    (ROOT / folder / "nothing.map").write_text("{ local: *; };\n")
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    run_ninja([ninja, "-f", (folder / "build.ninja").as_posix(), *jobs])
    return folder / "_csrc.so"


def run_ninja(command: list[str]) -> None:
    """Print what ninja prints; raise DoesNotCompile with the first error in it."""
    first_error = ""
    with subprocess.Popen(
        command, cwd=ROOT, text=True, errors="replace", stdout=subprocess.PIPE
    ) as ninja:
        for line in ninja.stdout:
            sys.stdout.write(line)
            sys.stdout.flush()
            if not first_error and re.search(r"error\b|undefined reference|cannot find", line):
                first_error = line.strip()
    if ninja.returncode != 0:
        raise DoesNotCompile(f"compiling failed: {first_error or 'see the output of the build'}")


def install_library(library: Path, target: Path) -> None:
    """Copy in one step, so that a process that has the old file open keeps it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_suffix(f".{os.getpid()}.tmp")
    shutil.copyfile(library, beside)
    os.replace(beside, target)
    target.with_name(BUILD_NOTE).unlink(missing_ok=True)


def install_without_library(reason: CannotBuild, target: Path) -> None:
    """Print why there is no library at `target`, and write it down for the package to say at run
    time. With HYLORA_REQUIRE_CSRC it is an error."""
    message = f"hylora_kernels/_csrc.so can't be built: {reason}"
    if is_set("HYLORA_REQUIRE_CSRC"):
        raise SystemExit(message)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)  # a library of older sources
    target.with_name(BUILD_NOTE).write_text(json.dumps({"no_library": str(reason)}) + "\n")
    print(f"\n{message}.\nThe eager backend will serve.\n", file=sys.stderr)


class BuildCsrc(Command):
    description = "build hylora_kernels/_csrc.so in place, only the files that changed"
    user_options: ClassVar[list] = []

    def initialize_options(self) -> None:
        """The command has no options."""

    finalize_options = initialize_options

    def run(self) -> None:
        sanitize = is_set("HYLORA_SANITIZE")
        try:
            library = compile_csrc(sanitize)
        except DoesNotCompile as reason:
            raise SystemExit(f"hylora_kernels/_csrc.so can't be built: {reason}") from None
        except CannotBuild as reason:
            if sanitize:
                raise SystemExit(f"no copy with sanitizers: {reason}") from None
            install_without_library(reason, ROOT / LIBRARY)
        else:
            if not sanitize:
                install_library(ROOT / library, ROOT / LIBRARY)


class BuildExt(build_ext):
    """Builds the library as the package's only extension: pip puts it into a wheel, or in place."""

    def run(self) -> None:
        target = ROOT / LIBRARY if self.inplace else Path(self.build_lib, LIBRARY)
        try:
            install_library(ROOT / compile_csrc(), target)
        except CannotBuild as reason:
            install_without_library(reason, target)

    def get_ext_filename(self, fullname: str) -> str:
        return str(LIBRARY)


class Wheel(bdist_wheel):
    """A wheel for every Python 3; without the library, for every platform too."""

    def get_tag(self) -> tuple[str, str, str]:
        built = Path(self.get_finalized_command("build").build_lib, LIBRARY).is_file()
        return "py3", "none", super().get_tag()[2] if built else "any"


if __name__ == "__main__":  # true under pip as well
    setup(
        ext_modules=[Extension("hylora_kernels._csrc", sources=[], optional=True)],
        cmdclass={"build_csrc": BuildCsrc, "build_ext": BuildExt, "bdist_wheel": Wheel},
    )
