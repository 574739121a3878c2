"""The configs of the Triton backend: legality, defaults, tuned tables, counters. No GPU, no
kernel."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from hylora_kernels.backends import triton as backend
from hylora_kernels.backends.shared import counters
from hylora_kernels.backends.triton import config as configs
from hylora_kernels.backends.triton.config import (
    BACKWARD,
    FORWARD,
    TORCH_PRODUCTS,
    TORCH_PRODUCTS_WORD,
    AdapterGradientsConfig,
    Config,
    Problem,
    Target,
    adapter_gradients_config,
    candidate_configs,
    default_config,
    why_illegal,
)
from hylora_kernels.backends.triton.dispatch import read_tables_again, tuned_or_default
from hylora_kernels.weights import Weights

pytestmark = pytest.mark.skipif(not backend.INSTALLED, reason=backend.why_not())

H100 = Target("cuda", 90, 132)
TARGETS = [Target("cuda", arch, 108) for arch in (80, 86, 89, 90, 100, 120)]
TARGETS.append(Target("hip", "gfx942", 304))
BF16 = Problem(1, 2048, 2048, 512, 32, torch.bfloat16)
ROWS = (1, 2, 16, 17, 64, 65, 256, 257, 2048, 100_000)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def of(**changes) -> Problem:
    return BF16._replace(**changes)


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: str(t.arch))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_candidate_is_legal_and_there_is_one(dtype, target):
    for M in ROWS:
        for direction in (FORWARD, BACKWARD):
            for K in (16, 576, 11008):
                problem = of(M=M, K=K, rank=8, dtype=dtype, direction=direction)
                found = candidate_configs(problem, target)
                assert found[0] is TORCH_PRODUCTS and len(found) > 1
                assert not any(why_illegal(c, dtype, target) for c in found[1:])
                assert len(set(found)) == len(found)
                for config in found[1:]:
                    steps = math.ceil(problem.depth / config.BK)
                    assert config.split == 1 or steps >= 2 * config.split
        tiles = adapter_gradients_config(of(M=M, dtype=dtype), target)
        assert tiles is TORCH_PRODUCTS or why_illegal(tiles, dtype, target) is None


def test_only_nvidia_prefetches_and_only_forward():
    assert any(c.prefetch for c in candidate_configs(BF16, H100)[1:])
    assert not any(c.prefetch for c in candidate_configs(BF16, TARGETS[-1])[1:])
    assert not any(c.prefetch for c in candidate_configs(of(direction=BACKWARD), H100)[1:])


@pytest.mark.parametrize(
    "config, words",
    [
        (Config(16, 24, 32, 16, 32), "BR must be a power of two, at least 16, got 24"),
        (Config(16, 16, 8, 16, 32), "BK must be a power of two, at least 16, got 8"),
        (Config(1, 8, 64, 8, 64), "a single row is multiplied with swap alone"),
        (Config(128, 256, 32, 256, 32, warps=4), "4 warps hold 128 sums a thread"),
        (Config(128, 128, 128, 128, 128, warps=8, stages=4), "262144 bytes of shared memory"),
        (AdapterGradientsConfig(64, 64, 8), "BA must be a power of two, at least 16, got 8"),
    ],
)
def test_why_illegal_names_what_is_wrong(config, words):
    assert words in why_illegal(config, torch.bfloat16, H100)


def test_a_single_row_may_have_any_tiles():
    assert why_illegal(Config(1, 4, 1024, 2, 2048, swap=True), torch.float32, H100) is None


def test_defaults():
    few, many = of(M=1), of(M=2048)
    assert isinstance(default_config(few, H100), Config)
    assert default_config(many, H100) is TORCH_PRODUCTS
    assert default_config(of(direction=BACKWARD), H100) is TORCH_PRODUCTS
    merged = of(lora_rank=0)
    assert isinstance(default_config(merged, H100, captured=True), Config)
    for problem in (few, merged):
        found = default_config(problem, H100, captured=False)
        assert found is TORCH_PRODUCTS, "torch's products cost the host less than a launch"
    large = of(lora_rank=0, K=4096, N=11008, rank=1568)
    assert default_config(large, H100) is TORCH_PRODUCTS
    assert default_config(of(M=16, dtype=torch.float32), H100) is TORCH_PRODUCTS
    interpreter = Target("interpreter", 0, 3)
    assert isinstance(default_config(many, interpreter), Config)


def test_the_adapters_gradients_are_torchs_where_the_sums_are_long():
    assert isinstance(adapter_gradients_config(of(M=2048), H100), AdapterGradientsConfig)
    assert adapter_gradients_config(of(M=2048), H100, captured=False) is TORCH_PRODUCTS
    assert adapter_gradients_config(of(M=8192, K=4096, N=11008), H100) is TORCH_PRODUCTS


def test_split_shares_cover_every_multiprocessor_but_not_more_than_there_is():
    short = candidate_configs(of(M=16, K=128), H100)[1]
    assert short.split == 1
    assert candidate_configs(of(M=16, K=4096), H100)[1].split > 1


# --------------------------------------------------------------------------------------- the table


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Write rows for a device called "Card 1" where the backend looks for them."""
    monkeypatch.setenv("HYLORA_CACHE", str(tmp_path))

    def write(*rows):
        read_tables_again()
        path = configs.table_path("Card 1")
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"format": configs.TABLE_FORMAT, "rows": rows}))

    yield write
    read_tables_again()


TILES = Config(16, 32, 64, 64, 64, split=2, swap=True)


def row(problem=BF16, graph=TILES, eager=TORCH_PRODUCTS) -> dict:
    sizes = problem._asdict() | {"dtype": str(problem.dtype).removeprefix("torch.")}

    graph, eager = (
        TORCH_PRODUCTS_WORD if config is TORCH_PRODUCTS else dataclasses.asdict(config)
        for config in (graph, eager)
    )
    return sizes | {"graph": graph, "eager": eager}


def test_the_table_decides_by_how_the_call_is_made(table):
    table(row())
    assert tuned_or_default(BF16, H100, "Card 1", captured=True) == TILES
    assert tuned_or_default(BF16, H100, "Card 1", captured=False) is TORCH_PRODUCTS
    assert tuned_or_default(BF16, H100, "Card 2", captured=True) == default_config(BF16, H100)


def test_without_a_table_one_line_of_the_log_names_the_command(table, caplog):
    read_tables_again()
    with caplog.at_level("INFO"):
        for _ in range(2):
            tuned_or_default(BF16, H100, "Card 3", captured=True)
    assert [record.getMessage() for record in caplog.records] == [
        "no measured table for Card 3: defaults serve; hylora tune --device cuda"
    ]


def test_a_table_of_an_older_format_is_measured_again(table, caplog):
    """Its rows say "vendor" and "residents", which nothing reads any more."""
    table()
    old = {"graph": "vendor", "eager": dataclasses.asdict(TILES) | {"residents": 1}}
    configs.table_path("Card 1").write_text(json.dumps({"rows": [row() | old]}))
    for captured in (True, False):
        found = tuned_or_default(BF16, H100, "Card 1", captured)
        assert found == default_config(BF16, H100, captured)
    assert "card-1.json is of an older format and not read" in caplog.text
    assert "hylora tune --device cuda" in caplog.text


def without(field):
    return {name: value for name, value in row().items() if name != field}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\0" * 100,
        "{",
        "[]",
        "null",
        json.dumps({"format": configs.TABLE_FORMAT}),
        *(
            json.dumps({"format": configs.TABLE_FORMAT, "rows": rows})
            for rows in (
                5,
                [5],
                [without("M")],
                [without("pivoted")],
                [without("eager")],
                [row() | {"K": "big"}],
                [row() | {"graph": "faster"}],
                [row() | {"graph": {"BM": 16}}],
                [row() | {"eager": dataclasses.asdict(TILES) | {"BM": "16"}}],
            )
        ),
    ],
)
def test_a_damaged_table_is_not_read(table, caplog, text):
    table()
    configs.table_path("Card 1").write_text(text)
    for captured in (True, False):
        found = tuned_or_default(BF16, H100, "Card 1", captured)
        assert found == default_config(BF16, H100, captured)
    assert "card-1.json is damaged" in caplog.text


def test_the_nearest_row_of_the_same_kind_decides(table):
    other = Config(16, 16, 64, 64, 64, swap=True)
    table(
        row(of(M=16)), row(of(M=64), graph=other), row(of(M=16, pivoted=True), graph=TORCH_PRODUCTS)
    )
    assert tuned_or_default(of(M=20), H100, "Card 1", True) == TILES
    assert tuned_or_default(of(M=40), H100, "Card 1", True) == other
    assert tuned_or_default(of(M=20, pivoted=True), H100, "Card 1", True) is TORCH_PRODUCTS
    far = of(M=16, K=16384, N=16384)
    assert tuned_or_default(far, H100, "Card 1", True) == default_config(far, H100)
    without = of(M=16, lora_rank=0)
    assert tuned_or_default(without, H100, "Card 1", True) == default_config(without, H100)


def test_a_row_that_does_not_fit_is_passed_over(table):
    one_row = Config(1, 8, 64, 8, 64, swap=True)
    table(row(of(M=1), graph=one_row), row(of(M=512), graph=Config(128, 128, 64, 256, 64, warps=8)))
    assert tuned_or_default(of(M=1), H100, "Card 1", True) == one_row
    assert tuned_or_default(of(M=3), H100, "Card 1", True) == default_config(of(M=3), H100)
    small = Target("cuda", 86, 84)
    assert tuned_or_default(of(M=512), small, "Card 1", True) == default_config(of(M=512), small)


SHIPPED = sorted(configs.SHIPPED_TABLES.glob("*.json"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_tables_that_come_with_the_package(path):
    whole = json.loads(path.read_text())
    assert path.name == configs.table_name(whole["device"])
    names = set(Problem._fields)
    for found in whole["rows"]:
        assert names <= set(found)
        for winner in (found["graph"], found["eager"]):
            if winner != TORCH_PRODUCTS_WORD:
                assert why_illegal(Config(**winner), torch.bfloat16, H100) is None
        best = min(found["timings"], key=lambda t: t["graph_cold"])
        assert found["graph"] == best["config"]


# ------------------------------------------------------------------------------- refusals, counters


def test_what_the_backend_refuses():
    x, weights = torch.randn(2, 5), Weights(torch.randn(3, 5), torch.randn(4, 3))
    if backend._interpreted():
        assert backend.unsupported(x, weights) is None
        assert "serves tensors on cpu" in backend.unsupported(x.to("meta"), weights)
        assert "float64" in backend.unsupported(x.double(), weights)
    empty = Weights(weights.SVh[:0], weights.U)
    assert backend.unsupported(x, empty) is not None
    assert not backend.is_faster_than_next(x, weights), "the interpreter is slower than eager"


def test_an_unlisted_architecture_gets_the_least_shared_memory():
    assert Target("cuda", 121, 1).shared_bytes == 99 * 1024
    assert Target("hip", "gfx1100", 1).shared_bytes == 64 * 1024
    assert Target("cuda", 90, 1).shared_bytes == 227 * 1024


@pytest.mark.skipif(not backend._interpreted(), reason="counts on the interpreter's device, a CPU")
def test_counters_are_kept_zero_and_grow():
    cpu = torch.device("cpu")
    few = counters.zeros(cpu, 10)
    assert counters.zeros(cpu, 20) is few and not few.any()
    many = counters.zeros(cpu, len(few) + 1)
    assert len(many) > len(few) and counters.zeros(cpu, 5) is many


def test_a_launch_that_breaks_off_does_not_hold_up_the_next(monkeypatch):
    """As on Ctrl-C in the interpreter: the next launch would wait for ever on its counters."""
    from hylora_kernels.backends.triton import kernels

    class BrokenOff:
        def __getitem__(self, grid):
            return self.warmup

        def warmup(self, *, Counters, **given):
            Counters.fill_(1)
            raise KeyboardInterrupt

    monkeypatch.setattr(kernels, "layer", BrokenOff())
    x, SVh, U = torch.ones(2, 16), torch.ones(4, 16), torch.ones(8, 4)
    with pytest.raises(KeyboardInterrupt), backend.forcing(Config(16, 16, 16, 16, 16, swap=True)):
        backend.forward(x, Weights(SVh, U))
    assert not counters.zeros(torch.device("cpu"), 1).any()


@pytest.mark.parametrize("K", [1, 6])
@pytest.mark.parametrize("ranks", [(1, 1), (1, 3), (4, 1), (4, 3)], ids=str)
@pytest.mark.parametrize("of_base", ["rows", "columns", "neither"])
@pytest.mark.parametrize("of_adapter", ["rows", "columns", "neither"])
def test_base_and_adapter_are_contiguous_alike(of_base, of_adapter, ranks, K):
    from hylora_kernels.backends.triton import launch

    def laid_out(how, rows):
        made = {
            "rows": torch.randn(rows, K),
            "columns": torch.randn(K, rows).T,
            "neither": torch.randn(2 * rows, 2 * K)[::2, ::2],
        }
        return made[how]

    given = laid_out(of_base, ranks[0]), laid_out(of_adapter, ranks[1])
    base, adapter, *strides = launch._with_unit_strides_alike(*given)
    assert [s == 1 for s in strides[0]] == [s == 1 for s in strides[1]]
    for before, after, stride in zip(given, (base, adapter), strides, strict=True):
        assert torch.equal(torch.as_strided(after, after.shape, stride), before)
