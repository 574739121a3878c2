"""`python -m hylora_kernels` is `hylora`."""

from hylora_kernels.cli import app

app(prog_name="hylora")
