"""`python -m hylora_kernels` is `hylora`."""

from hylora_kernels.cli.main import app

app(prog_name="hylora")
