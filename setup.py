"""Builds hylora_kernels/_csrc.so out of csrc/ with ninja; all else stands in pyproject.toml.

    pip install --no-build-isolation .      where the library can't be built it says why and goes
                                            on: the eager backend serves
    python setup.py build_csrc              the library in place, only what changed; sources that
                                            don't compile are an error

The library is plain C++ on LibTorch's stable ABI: no Python symbol in it, so one file serves every
Python and every torch from 2.10 on. Each file of csrc/cpu/kernels/ named in ISA is compiled for
that instruction set and nothing newer, all others for the compiler's baseline. Where there is an
nvcc the GPU's kernels come into the same file, and with them a runtime of their own: no library of
CUDA has to be there when it is loaded.

    CXX                     the compiler, with arguments if need be (g++, else clang++, else c++)
    HYLORA_CXXFLAGS         flags added to every compilation by it and to the link
    HYLORA_REQUIRE_CSRC=1   no library, for whatever reason, is an error
    CUDA_HOME               where nvcc is (else the one on PATH, else that of /usr/local/cuda)
    HYLORA_CUDA_ARCHS       GPUs to compile for: "80 90" (CUDA_ARCHS below), "none"
    HYLORA_REQUIRE_CUDA=1   no CUDA kernels, for whatever reason, is an error
    HYLORA_SANITIZE=1       build_csrc makes build/sanitized/_csrc.so and nothing else, with
                            AddressSanitizer and UndefinedBehaviorSanitizer; HYLORA_CSRC=<path>
                            loads it
    MAX_JOBS                compilations at once (ninja's default)
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
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
TORCH_TARGET = (2, 10)  # the oldest torch the library is to load in

# The file of each instruction set: its flags, and an instruction that needs them, to ask the
# compiler and its assembler whether they know it. What they don't know is left out, and isa.cpp,
# told so by a macro, names that as its reason.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *AVX2]
AVX512_BF16 = [*AVX512, "-mavx512bf16"]
AMX_BF16 = [*AVX512_BF16, "-mamx-tile", "-mamx-bf16", "-mprfchw"]
ISA = {
    "avx2": (AVX2, "vfmadd231ps %ymm0, %ymm0, %ymm0"),
    "avx512": (AVX512, "vpermw %zmm0, %zmm0, %zmm0"),
    "avx512_bf16": (AVX512_BF16, "vdpbf16ps %zmm0, %zmm0, %zmm0"),
    "amx_bf16": (AMX_BF16, "tdpbf16ps %tmm0, %tmm1, %tmm2"),
}
BINDING_FLAGS = ["-O2"]
# g++ 12 takes the undefined vectors of its own intrinsics for a mistake (its bug 105593).
KERNEL_FLAGS = ["-O3", "-fno-exceptions", "-fno-rtti", "-ffp-contract=fast"]
KERNEL_FLAGS += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]
COMMON_FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden"]
# Kernels share one signature and may not need all of it; vectors are never passed between files.
COMMON_FLAGS += ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-psabi"]
# A GPU that isn't among them takes the code of an older minor version (sm_103 that of sm_100), or
# PTX of the oldest, which goes along and which its driver compiles.
CUDA_ARCHS = (80, 86, 89, 90, 100, 120)
LEAST_ARCH = 80  # bf16 tensor cores, asynchronous copies
CUDA_FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
CUDA_FLAGS += ["-Xfatbin", "-compress-all"]  # a quarter of the size
# Checks as calls and -Og: the kernels are so long that checks in line take ten minutes to compile,
# and -O1 takes 166 seconds of a core instead of 126 for code that is no faster.
SANITIZE_FLAGS = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g1", "-Og"]
SANITIZE_FLAGS += ["--param", "asan-instrumentation-with-call-threshold=0"]
# vptr needs RTTI; what null and object-size find crashes anyway, or AddressSanitizer finds it.
SANITIZE_FLAGS += ["-fno-sanitize=vptr,null,object-size", "-fno-sanitize-recover=all"]


class CannotBuild(Exception):
    """Why there is no library, in words."""


class DoesNotCompile(CannotBuild):
    """All that is needed is there, but the sources didn't compile."""


class NoCuda(Exception):
    """Why there are no CUDA kernels in the library, in words; without a path, for they go into it
    to be said at run time."""


def is_set(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def compiler() -> list[str]:
    if os.name == "nt":
        raise CannotBuild("it is compiled with g++ or clang++, on Linux and macOS")
    command = shlex.split(os.environ.get("CXX", ""))
    if not command:
        found = [name for name in ("g++", "clang++", "c++") if shutil.which(name)]
        if not found:
            raise CannotBuild("no C++ compiler (g++ or clang++) was found")
        command = found[:1]
    if not shutil.which(command[0]):
        raise CannotBuild(f"the compiler that CXX names, {command[0]!r}, was not found")
    return command


def torch_folder() -> Path:
    """Where torch is installed; it isn't imported, which would take seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise CannotBuild(
            "torch isn't there while building (it has to be installed first, and pip needs "
            "--no-build-isolation)"
        )
    version = importlib.metadata.version("torch")
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < TORCH_TARGET:
        raise CannotBuild(f"torch {version} is older than {'.'.join(map(str, TORCH_TARGET))}")
    return Path(spec.submodule_search_locations[0])


def ninja() -> str:
    """The ninja of this environment, whether or not it is active, else the system's."""
    beside = shutil.which("ninja", path=os.path.dirname(sys.executable))
    found = beside or shutil.which("ninja")
    if found is None:
        raise CannotBuild("ninja isn't there while building (pip install ninja)")
    return found


def is_x86(cxx: list[str]) -> bool:
    machine = subprocess.run([*cxx, "-dumpmachine"], capture_output=True, text=True).stdout
    return machine.startswith(("x86_64", "amd64"))


def knows(cxx: list[str], flags: list[str], instruction: str) -> bool:
    """Whether the compiler takes these flags and its assembler this instruction."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(f'void probe() {{ __asm__ volatile("{instruction}"); }}\n')
        command = [*cxx, *flags, "-c", str(source), "-o", str(Path(folder, "probe.o"))]
        return subprocess.run(command, capture_output=True).returncode == 0


def sources_of(suffix: str) -> list[str]:
    """The files of csrc/, relative to the root."""
    return sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob(f"csrc/**/*.{suffix}"))


def plan(cxx: list[str]) -> dict[str, list[str]]:
    """Source file, relative to the root -> its flags; without those this compiler can't make."""
    sources = sources_of("cpp")
    if not sources:
        raise CannotBuild("there are no sources in csrc/")
    x86 = is_x86(cxx)
    files = {}
    for source in sources:
        name = Path(source).stem
        if not source.startswith("csrc/cpu/kernels/"):
            files[source] = BINDING_FLAGS
        elif name not in ISA or not x86:  # elsewhere those files compile to nothing
            files[source] = KERNEL_FLAGS
        elif knows(cxx, *ISA[name]):
            files[source] = KERNEL_FLAGS + ISA[name][0]
    left_out = [name for name in ISA if f"csrc/cpu/kernels/{name}.cpp" not in files]
    if left_out:
        print(f"hylora_kernels: {cxx[0]} leaves out {', '.join(left_out)}", file=sys.stderr)
    macros = [f"-DHYLORA_NO_{name.upper()}" for name in left_out]
    return {source: flags + macros for source, flags in files.items()}


class Cuda(NamedTuple):
    """What makes the GPU's kernels. libraries: where libcudart_static.a is. archs: 90 is sm_90."""

    nvcc: str
    libraries: str
    archs: list[int]

    @property
    def flags(self) -> list[str]:
        """All machine code is made of the PTX of the oldest: nvcc's front end takes 15 of the 23
        seconds that an arch would take by itself, and no kernel asks for anything newer."""
        oldest = f"compute_{LEAST_ARCH}"
        codes = ",".join([oldest, *(f"sm_{arch}" for arch in self.archs)])
        threads = os.environ.get("MAX_JOBS") or "0"  # 0: as many as there are cores
        return [*CUDA_FLAGS, "--threads", threads, f"-gencode=arch={oldest},code=[{codes}]"]


def wanted_archs() -> list[int]:
    """HYLORA_CUDA_ARCHS, ascending."""
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
    """Raises NoCuda where the kernels can't be compiled, or aren't wanted."""
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
        raise NoCuda("nvcc didn't get on with the C++ compiler when the library was built")
    return Cuda(nvcc, libraries[0], archs)


def cuda_or_reason(sanitize: bool) -> Cuda | NoCuda:
    """What compiles the kernels, or why there will be none, said once; an error where they are
    required."""
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
    """What csrc/cuda/bindings.cpp is told of the machine code beside it."""
    if isinstance(cuda, NoCuda):
        return [f'-DHYLORA_NO_CUDA="{cuda}"']
    return [f'-DHYLORA_CUDA_ARCHS="{" ".join(map(str, cuda.archs))}"']


def escaped(words: list[str]) -> str:
    """Words as they stand in a build.ninja: quoted for the shell, $ doubled for ninja."""
    return " ".join(shlex.quote(word) for word in words).replace("$", "$$")


def path(name: str) -> str:
    """A path as it stands in a build line of a build.ninja."""
    return name.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_file(folder: str, sanitize: bool) -> str:
    """The build.ninja that makes folder/_csrc.so; paths are relative to the root.

    Of torch libtorch_cpu alone is linked, by name: torch has loaded it before the library comes, so
    no folder of this machine is written into it."""
    cxx, torch = compiler(), torch_folder()
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
    builds = [("cxx", source, flags + extra) for source, flags in plan(cxx).items()]
    if kernels := sources_of("cu"):
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
    """commands: rule -> what it runs. builds: (rule, source, flags of its own)."""
    lines = ["ninja_required_version = 1.5", f"builddir = {path(folder)}"]
    for rule in sorted({rule for rule, _, _ in builds}):
        lines += [
            f"rule {rule}",
            f"  command = {escaped(commands[rule])} $flags -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            f"  description = {rule.replace('cxx', 'c++')} $in",
        ]
    lines += [
        "rule link",
        f"  command = {escaped(commands['link'])} $in {escaped(libraries)} -o $out",
        "  description = link $out",
    ]
    objects = []
    for rule, source, flags in builds:
        objects.append(path(f"{folder}/{source.removeprefix('csrc/')}.o"))
        lines += [f"build {objects[-1]}: {rule} {path(source)}", f"  flags = {escaped(flags)}"]
    lines.append(f"build {path(f'{folder}/_csrc.so')}: link {' '.join(objects)}")
    return "\n".join([*lines, ""])


def compile_csrc(sanitize: bool = False) -> Path:
    """Brings build/csrc/_csrc.so, or build/sanitized/'s, up to date; returns it, from the root."""
    folder = Path("build", "sanitized" if sanitize else "csrc")
    program, rules = ninja(), ninja_file(folder.as_posix(), sanitize)
    (ROOT / folder).mkdir(parents=True, exist_ok=True)
    (ROOT / folder / "build.ninja").write_text(rules)
    # No symbol needs to be seen from outside: the ops register themselves when it is loaded.
    (ROOT / folder / "nothing.map").write_text("{ local: *; };\n")
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    done = subprocess.run([program, "-f", (folder / "build.ninja").as_posix(), *jobs], cwd=ROOT)
    if done.returncode != 0:
        raise DoesNotCompile("compiling failed, see above")
    return folder / "_csrc.so"


def put(library: Path, target: Path) -> None:
    """Copies in one step: a process that has the old file open keeps it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_suffix(f".{os.getpid()}.tmp")
    shutil.copyfile(library, beside)
    os.replace(beside, target)


def go_without(reason: CannotBuild, target: Path) -> None:
    """No library at `target`, said once; an error where it is required."""
    message = f"hylora_kernels/_csrc.so can't be built: {reason}"
    if is_set("HYLORA_REQUIRE_CSRC"):
        raise SystemExit(message)
    target.unlink(missing_ok=True)  # would be one of older sources
    print(f"\n{message}.\nThe eager backend will serve.\n", file=sys.stderr)


class BuildCsrc(Command):
    description = "build hylora_kernels/_csrc.so in place, only what changed"
    user_options: ClassVar[list] = []

    def initialize_options(self) -> None:
        """A command without options."""

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
            go_without(reason, ROOT / LIBRARY)
        else:
            if not sanitize:
                put(ROOT / library, ROOT / LIBRARY)


class BuildExt(build_ext):
    """The library as the package's one extension, for pip: into the wheel, or in place."""

    def run(self) -> None:
        target = ROOT / LIBRARY if self.inplace else Path(self.build_lib, LIBRARY)
        try:
            put(ROOT / compile_csrc(), target)
        except CannotBuild as reason:
            go_without(reason, target)

    def get_ext_filename(self, fullname: str) -> str:
        return str(LIBRARY)


class Wheel(bdist_wheel):
    """For every Python 3, and for every platform where there is no library in it."""

    def get_tag(self) -> tuple[str, str, str]:
        built = Path(self.get_finalized_command("build").build_lib, LIBRARY).is_file()
        return "py3", "none", super().get_tag()[2] if built else "any"


if __name__ == "__main__":  # so it is for pip, too
    setup(
        ext_modules=[Extension("hylora_kernels._csrc", sources=[], optional=True)],
        cmdclass={"build_csrc": BuildCsrc, "build_ext": BuildExt, "bdist_wheel": Wheel},
    )
