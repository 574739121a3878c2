"""What others install: the source distribution and the wheel, from the files that git tracks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from helpers.building import ROOT, needs_gxx, run_setup
from packaging.metadata import Metadata

if not (ROOT / ".git").exists():
    pytest.skip("needs a git checkout", allow_module_level=True)

# Only the repository needs these.
NOT_DISTRIBUTED = {".ci/run", ".gitignore", ".pre-commit-config.yaml"}


def tracked_files() -> set[str]:
    command = ["git", "-C", ROOT, "ls-files", "-z"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name for name in listed.split("\0") if name and (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A folder with the tracked files as they are now, uncommitted changes included."""
    folder = tmp_path_factory.mktemp("clone")
    for name in tracked_files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def sdist(clone) -> Path:
    done = run_setup(clone, "--quiet", "sdist", "--formats=gztar")
    assert done.returncode == 0, done.stderr
    (archive,) = (clone / "dist").glob("*.tar.gz")
    return archive


def test_the_source_distribution_holds_every_tracked_file(sdist):
    with tarfile.open(sdist) as archive:
        members = [m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()]
    made = {name for name in members if ".egg-info/" in name} | {"PKG-INFO", "setup.cfg"}
    assert set(members) - made == tracked_files() - NOT_DISTRIBUTED
    assert tracked_files() >= NOT_DISTRIBUTED


def test_the_metadata_is_what_an_index_accepts(sdist):
    with tarfile.open(sdist) as archive:
        folder = archive.getnames()[0]
        metadata = Metadata.from_email(archive.extractfile(f"{folder}/PKG-INFO").read())
    assert (
        metadata.name == "hylora-kernels" and metadata.description_content_type == "text/markdown"
    )
    assert metadata.license_expression == "Apache-2.0" and metadata.license_files == ["LICENSE"]


ONE_OP = """
import torch, hylora_kernels
assert "site-packages" in hylora_kernels.__file__, hylora_kernels.__file__
assert hylora_kernels.available_backends()["cpu"] == ""
torch.manual_seed(0)
for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
    layer = hylora_kernels.SVDLoRALinear(256, 192, 64, lora_rank=8, dtype=dtype).eval()
    torch.nn.init.normal_(layer.B, std=0.1)
    x = torch.randn(16, 256, dtype=dtype)
    with torch.no_grad(), hylora_kernels.use_backend("cpu"):
        y = layer(x).double()
    wide = layer.double()
    exact = x.double() @ wide.SVh.T @ wide.U.T + wide.bias + x.double() @ wide.A.T @ wide.B.T
    error = ((y - exact).norm() / exact.norm()).item()
    print(dtype, error)
    assert error < tolerance, error
"""


@needs_gxx
@pytest.mark.skipif(sys.platform != "linux", reason="auditwheel is for Linux")
@pytest.mark.skipif(
    os.environ.get("HYLORA_TEST_ALL", "0") in ("", "0"),
    reason="installs torch into an environment of its own: make test-all does",
)
def test_the_wheel_works_in_an_empty_environment(tmp_path):
    """The recipe of `make wheel`, then torch and that wheel without the pipeline's dependencies."""
    recipe = ["make", "-C", ROOT, "-o", "build", "wheel", f"DIST={tmp_path / 'dist'}"]
    subprocess.run(recipe, check=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert "-py3-none-manylinux_" in wheel.name
    files = zipfile.ZipFile(wheel).namelist()
    assert [name for name in files if name.endswith((".so", "_build.json"))] == [
        "hylora_kernels/_csrc.so"
    ]
    python = tmp_path / "empty" / "bin" / "python"
    venv.create(tmp_path / "empty", with_pip=True)
    for arguments in (["torch==2.13.0"], ["tqdm"], ["--no-deps", wheel]):
        subprocess.run([python, "-m", "pip", "install", "--quiet", *arguments], check=True)
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([python, "-c", ONE_OP], cwd=tmp_path, env=clean, check=True)
