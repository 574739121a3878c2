"""The tests catch bugs that are put into the package and into the CPU kernels, one at a time.

Each mutant names the test that must fail because of it. HYLORA_TEST_ALL=1 (make test-all) runs
them; otherwise only that each of them still has its place in the source and its test.
`pytest -s` prints the table.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.building import ROOT
from helpers.mutants import TESTS, Mutant, copy_checkout, run_tests

ALL = os.environ.get("HYLORA_TEST_ALL") == "1"
takes_long = pytest.mark.skipif(not ALL, reason="takes minutes: HYLORA_TEST_ALL=1")
BATTERY = "helpers/cpu_battery.py::main"
LEVELS = ("scalar", "avx2")  # that every x86-64 machine of today has

PYTHON = {
    # ---------------------------------------------------------------- cache: keys, checksums, names
    "seed left out of the key of randomized factors": Mutant(
        "hylora_kernels/compression/workspace.py",
        'seed=options.seed if options.factorizer == "randomized" else 0',
        "seed=0",
        "compression/test_workspace_files.py::test_the_seed_is_in_the_key_where_it_draws_the_factors",
    ),
    "ranks left out of the key of a refit": Mutant(
        "hylora_kernels/compression/compress.py",
        "fingerprint(ids=ids, ranks=ranks)",
        "fingerprint(ids=ids)",
        "compression/test_workspace_files.py::test_an_option_changes_the_key_of_what_it_changes",
    ),
    "unsaved buffers left out of the key": Mutant(
        "hylora_kernels/support/hashing.py",
        "module.state_dict() | dict(module.named_buffers())",
        "module.state_dict()",
        "support/test_hashing.py::test_a_buffer_that_is_not_saved_counts",
    ),
    "checksum not compared": Mutant(
        "hylora_kernels/support/cache.py",
        "if checksum == tensor_hash(tensors.items(), name):",
        "if checksum:",
        "support/test_cache.py::test_every_flipped_bit_is_seen",
    ),
    "a refit's checksum without the weights it belongs to": Mutant(
        "hylora_kernels/compression/workspace.py",
        'f"{self._files.name}/{key}"',
        "key",
        "compression/test_workspace_files.py::test_damaged_files_are_made_again",
    ),
    "temporary names without a random part": Mutant(
        "hylora_kernels/support/storage.py",
        'f".{os.urandom(6).hex()}.{path.name}"',
        'f".{path.name}"',
        "support/test_cache.py::test_temporary_names_differ",
    ),
    "another program's tagged folder cleared": Mutant(
        "hylora_kernels/support/cache.py",
        "not folder.is_symlink() and _tag(folder) == TAG_TEXT",
        "not folder.is_symlink() and _tag(folder) is not None",
        "support/test_cache.py::test_clearing_leaves_folders_that_others_tagged",
    ),
    # ---------------------------------------------------------------------------------- compression
    "a dead layer that outbids others": Mutant(
        "hylora_kernels/compression/whiten.py",
        "S = S * DEAD",
        "S = S * 1.0",
        "compression/test_whiten.py::test_a_dead_layer_is_factorized_and_outbid_by_any_other",
    ),
    "columns rounded by rising weight": Mutant(
        "hylora_kernels/compression/gptq.py",
        "G.diagonal().argsort(descending=True, stable=True)",
        "G.diagonal().argsort(stable=True)",
        "compression/test_quantize.py::test_gptq_is_the_published_one",
    ),
    "groups of columns in the order in which they are rounded": Mutant(
        "hylora_kernels/compression/gptq.py",
        "group = group[given.order]",
        "group = group.sort().values",
        "compression/test_quantize.py::test_gptq_is_the_published_one",
    ),
    "a clipped grid chosen without the columns' weights": Mutant(
        "hylora_kernels/layers/grids.py",
        "if weights is None else weights.sqrt()",
        "if True else weights",
        "compression/test_quantize.py::test_gptq_is_the_published_one",
    ),
    "a quantised dead layer that outbids others": Mutant(
        "hylora_kernels/compression/quantize.py",
        "lost * DEAD**2 if dead else lost",
        "lost",
        "compression/test_quantize.py::test_error_of_a_dead_layer_outbids_nobody_as_its_ranks_do",
    ),
    "U fitted to SVh as it was before": Mutant(
        "hylora_kernels/compression/quantize.py",
        "V = dequantize(codes, torch.float64).to(U.device)",
        "V = SVh",
        "compression/test_quantize.py::test_a_pair_is_refitted_to_what_its_quantised_SVh_became",
    ),
    "columns of U of any size under one scale": Mutant(
        "hylora_kernels/compression/quantize.py",
        "U.abs().amax(0) / LARGEST",
        "torch.ones_like(U[0])",
        "compression/test_quantize.py::test_a_pairs_components_may_have_any_size",
    ),
    "an adapter that takes the base's last rank": Mutant(
        "hylora_kernels/compression/ranks.py",
        "return min(lora_rank, total_rank - 1)",
        "return min(lora_rank, total_rank)",
        "compression/test_ranks.py::test_an_adapter_leaves_the_base_a_rank",
    ),
    "what earlier writers of a block lost is forgotten": Mutant(
        "hylora_kernels/compression/refit.py",
        "lost = lost + dense.outputs[writer] - seen.outputs[writer]",
        "lost = lost + 0 * dense.outputs[writer]",
        "compression/test_refit.py::test_each_matrix_is_the_solution_of_its_ridge_regression",
    ),
    "a refit that forgets the compressed prefix": Mutant(
        "hylora_kernels/compression/refit.py",
        "batch.student_call.run(student.module, batch.student)",
        "batch.student_call.run(block.module, batch.student)",
        "compression/test_refit.py::test_each_matrix_is_the_solution_of_its_ridge_regression",
    ),
    "one draw for all classic adapters": Mutant(
        "hylora_kernels/compression/compress.py",
        "self.options.seed + index",
        "self.options.seed",
        "compression/test_compress.py::test_a_classic_adapter_starts_as_nothing",
    ),
    "a budget met from above": Mutant(
        "hylora_kernels/compression/ranks.py",
        "low, high = (middle, high) if fits(at(middle)) else (low, middle)\n    return at(low)",
        "low, high = (middle, high) if fits(at(middle)) else (low, middle)\n    return at(high)",
        "compression/test_ranks.py::test_budget",
    ),
    # ------------------------------------------------------------------------------------- recovery
    "the optimizer's step not restored": Mutant(
        "hylora_kernels/recovery/run.py",
        '"step": torch.tensor(float(step), device=device)',
        '"step": torch.tensor(0.0, device=device)',
        "recovery/test_run.py::test_resumed_run_ends_with_the_same_bits",
    ),
    "alpha left out of the base's hash": Mutant(
        "hylora_kernels/recovery/recipe.py",
        'f"{path} {layer.alpha} {layer.lora_dropout}\\n"',
        'f"{path} {layer.lora_dropout}\\n"',
        "recovery/test_run.py::test_alpha_and_dropout_are_part_of_the_base",
    ),
    "a warm-up that starts a step late": Mutant(
        "hylora_kernels/recovery/recipe.py",
        "return self.lr * step / self.warmup",
        "return self.lr * (step - 1) / self.warmup",
        "recovery/test_finetune.py::test_learning_rate",
    ),
    "bad adapters kept after a loss that is not finite": Mutant(
        "hylora_kernels/recovery/run.py",
        "        torch._foreach_copy_(self.parameters, self.good)\n",
        "",
        "recovery/test_run.py::test_not_finite_stops_with_the_last_good_adapters",
    ),
    "the teacher's damaged states not made again": Mutant(
        "hylora_kernels/recovery/teacher.py",
        "is_missing = files.find(_name(ids)) is None",
        "is_missing = not files.path(_name(ids)).exists()",
        "recovery/test_teacher.py::test_a_flipped_bit_is_noticed_and_made_again",
    ),
    "recovery on the blocks of calibration": Mutant(
        "hylora_kernels/recovery/blocks.py",
        '"recovery", o.split',
        '"calibration", o.split',
        "recovery/test_teacher.py::test_blocks_are_none_of_calibrations",
    ),
    "KL from the model to the teacher": Mutant(
        "hylora_kernels/model/loss.py",
        "q = log_q.exp()",
        "q = log_p.exp()",
        "model/test_loss.py::test_distillation",
    ),
    # ----------------------------------------------------------------------------------- checkpoint
    "a tensor's checksum not compared": Mutant(
        "hylora_kernels/model/tensorfile.py",
        "if checksum(tensor) != expected:",
        "if not expected:",
        "model/test_broken_checkpoint.py::test_any_flipped_byte_is_noticed",
    ),
    "a dropout that is not restored": Mutant(
        "hylora_kernels/model/skeleton.py",
        "return SVDLoRALinear(*sizes, bias, alpha, lora_dropout, form",
        "return SVDLoRALinear(*sizes, bias, alpha, 0.0, form",
        "model/test_checkpoint.py::test_mixed_dtypes_dropout_and_trainability",
    ),
    # ----------------------------------------------------------------------------------- evaluation
    "resident bytes without the panels": Mutant(
        "hylora_kernels/evaluation/size.py",
        "resident_bytes=_storage_bytes(parameters + all_buffers)",
        "resident_bytes=_storage_bytes(parameters + buffers)",
        "evaluation/test_size.py::test_resident_bytes_count_the_panels_of_packed_layers",
    ),
}
KERNELS = {
    "adapter added by every pass of expand": Mutant(
        "csrc/cpu/kernels/expand.h",
        "if (last_pass && call.adapter == Adapter::separate) {",
        "if (call.adapter == Adapter::separate) {",
        BATTERY,
    ),
    "the others of the group before not carried over": Mutant(
        "csrc/cpu/kernels/merge.h",
        "if (group_end * 32 < b.call.expand.n)",
        "if (group_end * 32 < 0)",
        BATTERY,
    ),
    "dx of an adapter without alpha": Mutant(
        "csrc/cpu/kernels/shrink.h",
        "sum.v[i] *= scale.v[i];",
        "sum.v[i] *= b.call.backward ? splat(1.0f) : scale.v[i];",
        BATTERY,
    ),
    "the others' bias taken from the pivots": Mutant(
        "csrc/cpu/kernels/merge.h",
        "load_bias(b, b.plan.base_panels + panel);",
        "load_bias(b, panel);",
        BATTERY,
    ),
    "the last of few rows not merged": Mutant(
        "csrc/cpu/group.cpp",
        "call.merges_pivots() ? call.M : 0,",
        "call.merges_pivots() ? call.M - 1 : 0,",
        BATTERY,
    ),
    "alpha lost by a packed layer": Mutant(
        "csrc/cpu/packed_layer.cpp",
        "call.adapter = header.adapter, call.alpha = header.alpha;",
        "call.adapter = header.adapter, call.alpha = 1.0f;",
        BATTERY,
    ),
    "the sums of bias gradients scaled": Mutant(
        "csrc/cpu/kernels/adapter_gradients.h",
        "      if (i < call.ra)\n",
        "",
        BATTERY,
    ),
    "x of quantised layers taken from a plain one of the group": Mutant(
        "csrc/cpu/group.cpp",
        "char*& x = prepared[member.call.is_quantized()];",
        "char*& x = prepared[0];",
        BATTERY,
    ),
    "h not made fixed point": Mutant(
        "csrc/cpu/kernels/engine.h",
        "    b.fix_h();\n",
        "",
        BATTERY,
    ),
    "Inf read as a number of fixed point": Mutant(
        "csrc/cpu/kernels/fixed_point.h",
        "exponent == 255) {",
        "exponent == 256) {",
        BATTERY,
    ),
    "one of a tile's separate sums dropped": Mutant(
        "csrc/cpu/kernels/fma.h",
        "for (int u = 1; u < U; u++)",
        "for (int u = 2; u < U; u++)",
        BATTERY,
    ),
}
ROW_OPS = "backends/cpu/test_row_ops.py::"
DECODER = "backends/cpu/test_decoder.py::"
DECODING = {
    "what earlier chunks of keys gave not scaled down": Mutant(
        "csrc/cpu/kernels/attention.h",
        "sums[0][r][c] = splat(decay[r]) * load(to + r * ldto + c * W);",
        "sums[0][r][c] = load(to + r * ldto + c * W);",
        f"{ROW_OPS}test_attention",
    ),
    "a sliding window one key wider": Mutant(
        "csrc/cpu/kernels/attention.h",
        "slot(query) - call.window + 1",
        "slot(query) - call.window",
        f"{ROW_OPS}test_attention",
    ),
    "partials of attention joined without their scale": Mutant(
        "csrc/cpu/kernels/attention.h",
        "total += partial[1] * factor;",
        "total += partial[1];",
        f"{ROW_OPS}test_attention",
    ),
    "rotary embeddings turned the other way": Mutant(
        "csrc/cpu/kernels/rotary.h",
        "b = b * cos + a * sin;",
        "b = b * cos - a * sin;",
        f"{ROW_OPS}test_rotary",
    ),
    "a norm without epsilon": Mutant(
        "csrc/cpu/kernels/norm.h",
        "__builtin_sqrtf(square + call.eps)",
        "__builtin_sqrtf(square)",
        f"{ROW_OPS}test_norm",
    ),
    "keys and values cached a slot too early": Mutant(
        "csrc/cpu/decoder.cpp",
        "call.y = y + step_.slot * heads.size * size_;",
        "call.y = y + (step_.slot - 1) * heads.size * size_;",
        f"{DECODER}test_a_step_writes_its_slot_of_its_sequences_alone",
    ),
    "a step that doesn't see its own key": Mutant(
        "csrc/cpu/decoder.cpp",
        "call.keys = step.slot + 1,",
        "call.keys = step.slot,",
        "inference/test_decoder.py::test_sequences_padded_on_the_left",
    ),
}
MUTANTS = PYTHON | KERNELS | DECODING


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_has_its_place_and_its_test(name):
    mutant = MUTANTS[name]
    assert mutant.mutated() != (ROOT / mutant.file).read_text(encoding="utf-8")
    file, function = mutant.test.split("::")
    assert re.search(rf"^def {function}\(", (TESTS / file).read_text(encoding="utf-8"), re.M)


# ------------------------------------------------------------------------------------- the package


@takes_long
def test_the_package_as_it_is_passes(tmp_path):
    done = run_tests(copy_checkout(tmp_path), *{mutant.test for mutant in PYTHON.values()})
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@takes_long
@pytest.mark.parametrize("name", PYTHON)
def test_a_mutant_of_the_package_is_caught(name, tmp_path):
    mutant = PYTHON[name]
    mutant.write(copy_checkout(tmp_path))
    begin = time.perf_counter()
    done = run_tests(tmp_path, mutant.test)
    print(f"{name:<60} {mutant.test} {time.perf_counter() - begin:.0f} s")
    assert done.returncode == 1, f"survives: {done.stdout[-2000:]}{done.stderr[-2000:]}"


# -------------------------------------------------------------------------------------- the kernels


class KernelBuild:
    """A copy of csrc/ with two levels alone, which take a minute to compile."""

    def __init__(self, folder: Path):
        self.folder = folder
        shutil.copytree(ROOT / "csrc", folder / "csrc")
        shutil.copy(ROOT / "setup.py", folder)
        spec = importlib.util.spec_from_file_location("setup_of_mutants", folder / "setup.py")
        self.setup = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.setup)
        self.setup.wanted_archs = self._no_gpu

    def _no_gpu(self):
        raise self.setup.NoCuda("the mutants are of the CPU kernels")

    def failure(self, *tests: str) -> str:
        """Build, run the battery, or tests of the package; why they failed, "" if they passed."""
        with pytest.MonkeyPatch.context() as environment:
            environment.delenv("HYLORA_REQUIRE_CUDA", raising=False)
            environment.setenv("HYLORA_ISAS", "avx2")
            library = self.folder / self.setup.compile_csrc()
        if tests:
            done = run_tests(ROOT, *tests, HYLORA_CSRC=str(library))
            assert done.returncode in (0, 1), done.stdout[-4000:] + done.stderr[-4000:]
            return "" if done.returncode == 0 else done.stdout
        done = subprocess.run(
            [
                sys.executable,
                str(TESTS / "helpers" / "cpu_battery.py"),
                library,
                *LEVELS,
                "--quick",
            ],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)},
            capture_output=True,
            text=True,
            timeout=1800,
        )
        return "" if done.returncode == 0 else done.stderr or str(done.returncode)


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    if shutil.which("g++") is None or not (ROOT / "csrc").is_dir():
        pytest.skip("needs g++ and a checkout")
    build = KernelBuild(tmp_path_factory.mktemp("kernels"))
    assert build.failure() == ""
    assert build.failure(*{mutant.test for mutant in DECODING.values()}) == ""
    return build


@takes_long
@pytest.mark.skipif(platform.machine() != "x86_64", reason="needs an x86-64 processor")
@pytest.mark.parametrize("name", KERNELS | DECODING)
def test_a_mutant_of_the_kernels_is_caught(name, build):
    mutant = MUTANTS[name]
    mutant.write(build.folder)
    begin = time.perf_counter()
    try:
        reason = build.failure(*([] if mutant.test == BATTERY else [mutant.test]))
    finally:
        shutil.copy(ROOT / mutant.file, build.folder / mutant.file)
    print(f"{name:<60} {reason.strip().splitlines()[-2:-1]} {time.perf_counter() - begin:.0f} s")
    assert reason, "survives"
