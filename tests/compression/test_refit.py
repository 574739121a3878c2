"""The refit of U: against ridge regressions solved the long way, in whole-model forwards."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from helpers.zoo import NAMES, ZOO, paths_of, tokens, trained, zoo_model
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.pytorch_utils import Conv1D

from hylora_kernels.compression import refit
from hylora_kernels.compression.chain import BATCH, record
from hylora_kernels.compression.compress import compress
from hylora_kernels.compression.refit import refit_blocks
from hylora_kernels.compression.whiten import factorize_whitened
from hylora_kernels.model.loss import token_loss
from hylora_kernels.model.structure import as_matrix, discover

IDS = tokens(6, 12)  # One batch of BATCH, and a smaller one.


def factors_of(model, paths, seed=0):
    """path -> factors whitened by random Gram matrices, so that U and SVh are nothing special."""
    generator, factors = torch.Generator().manual_seed(seed), {}
    for path in paths:
        N, K = as_matrix(model.get_submodule(path)).shape
        X, Y = (torch.randn(3 * n, n, generator=generator) for n in (K, N))
        W = as_matrix(model.get_submodule(path))
        factors[path] = factorize_whitened(path, W, X.T @ X, Y.T @ Y)
    return factors


def refitted(model, factors, ranks, ids=IDS):
    """path -> the matrix that refit makes of it, [N, K] float64."""
    results = refit_blocks(
        model, discover(model).blocks, ids, factors.get, ranks, {}.get, progress=False
    )
    products = {}
    for _, matrices in results:
        for path, matrix in matrices.items():
            product = matrix.double()
            if ranks[path]:
                product = product @ factors[path].SVh[: ranks[path]].double()
            products[path] = product
    return products


def difference(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


# --------------------------------------------------------------------------- the same, the long way


def set_weight(linear, W):
    with torch.no_grad():
        linear.weight.copy_(W.T if isinstance(linear, Conv1D) else W)


def watched(model, ids, paths):
    """path -> (what it reads, what it makes), rows [T, ...], in a forward of the whole model."""
    seen, hooks = {}, []
    for path in paths:

        def hook(_module, args, kwargs, output, path=path):
            x = args[0] if args else kwargs["hidden_states"]
            output = output[0] if isinstance(output, tuple) else output
            seen[path] = x.flatten(0, -2), output.flatten(0, -2)

        module = model.get_submodule(path)
        hooks.append(module.register_forward_hook(hook, with_kwargs=True))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def ridge(X, Y, prior, strength):
    """The B of least |X B^T - Y|^2 + strength |B - prior|^2."""
    root = strength**0.5 * torch.eye(X.shape[1], dtype=X.dtype)
    rows, targets = torch.cat([X, root]), torch.cat([Y, root @ prior.T])
    return torch.linalg.lstsq(rows, targets, driver="gelsd").solution.T


def by_regression(name, model, factors, ranks, ids=IDS):
    """The refit by definition: one regression for each linear, in the order of the calls."""
    arch, student = ZOO[name], copy.deepcopy(model)
    found = {}
    blocks = [f"{arch.blocks}.{i}" for i in range(arch.config.num_hidden_layers)]
    for block in blocks:
        writers = [f"{block}.{path}" for path in arch.writers]
        for group in (group for group in paths_of(name) if group[0].startswith(block + ".")):
            paths = [block, group[0], *writers]
            of_dense, of_student = watched(model, ids, paths), watched(student, ids, paths)
            x_t, x_s = of_dense[group[0]][0], of_student[group[0]][0]
            lost = 0
            if group[0] in writers:
                lost = of_dense[block][0] - of_student[block][0]
                for writer in writers[: writers.index(group[0])]:
                    lost = lost + of_dense[writer][1] - of_student[writer][1]
            for path in group:
                W, rank = as_matrix(model.get_submodule(path)), ranks[path]
                target = x_t @ W.T + lost
                if rank:
                    S = factors[path].S[:rank].double()
                    V = factors[path].SVh[:rank].double() / S[:, None]
                    z = x_s @ V.T
                    prior = factors[path].U[:, :rank].double() * S
                    found[path] = ridge(z, target, prior, 4 * z.square().sum(0).mean()) @ V
                else:
                    found[path] = ridge(x_s, target, W, 1e-3 * x_s.square().sum(0).mean())
            for path in group:
                set_weight(student.get_submodule(path), found[path])
    return found


@pytest.mark.parametrize("name", NAMES)
def test_each_matrix_is_the_solution_of_its_ridge_regression(name):
    model = zoo_model(name, torch.float64)
    paths = [path for group in paths_of(name) for path in group]
    factors = factors_of(model, paths)
    # All kinds: low rank, full rank, left dense.
    ranks = {path: (6, 11, 0, 16, 3)[i % 5] for i, path in enumerate(paths)}
    got, want = refitted(model, factors, ranks), by_regression(name, model, factors, ranks)
    assert list(got) == paths
    for path in paths:
        error = difference(got[path], want[path])
        assert error < 1e-3, f"{path}: {error:.2g}"
        W = as_matrix(model.get_submodule(path))
        start = W
        if ranks[path]:
            U, SVh = factors[path].U[:, : ranks[path]], factors[path].SVh[: ranks[path]]
            start = U.double() @ SVh.double()
        # Nothing is lost in front of the first group, or of the first linear of a parallel MLP.
        if path not in (*paths_of(name)[0], "gpt_neox.layers.0.mlp.dense_h_to_4h"):
            assert difference(got[path], start) > 1e-3, f"{path} hasn't moved"


@pytest.mark.parametrize("name", NAMES)
def test_nothing_to_make_up_for_changes_nothing(name):
    model = zoo_model(name, torch.float64)
    paths = [path for group in paths_of(name) for path in group]
    factors = factors_of(model, paths)
    full = {path: min(as_matrix(model.get_submodule(path)).shape) for path in paths}
    for ranks in (dict.fromkeys(paths, 0), full):
        for path, matrix in refitted(model, factors, ranks).items():
            assert difference(matrix, as_matrix(model.get_submodule(path))) < 1e-5, path


def test_the_model_is_only_looked_at():
    model = zoo_model("llama")
    before = copy.deepcopy(model.state_dict())
    paths = [path for group in paths_of("llama") for path in group]
    refitted(model, factors_of(model, paths), dict.fromkeys(paths, 5))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for module in model.modules():
        assert not (module._forward_hooks or module._forward_pre_hooks)


def test_finished_blocks_are_taken_as_they_are():
    model = zoo_model("llama")
    paths = [path for group in paths_of("llama") for path in group]
    factors, blocks = factors_of(model, paths), discover(model).blocks
    ranks = dict.fromkeys(paths, 5) | {paths[-1]: 0}

    def run(done):
        return dict(refit_blocks(model, blocks, IDS, factors.get, ranks, done.get, progress=False))

    whole = run({})
    first = {block.path: whole[block.path] for block in blocks[:1]}
    resumed = run(first)
    for block, matrices in whole.items():
        assert resumed[block].keys() == matrices.keys()
        for path, matrix in matrices.items():
            assert torch.equal(resumed[block][path], matrix)
    marked = {block: {p: m + 1 for p, m in part.items()} for block, part in first.items()}
    other = run(marked)
    assert other[blocks[0].path] is marked[blocks[0].path]
    last = blocks[1].path
    assert not torch.equal(other[last][paths[-1]], whole[last][paths[-1]])


# ------------------------------------------------------------------- products that are not repeated


class TwiceInPlace(LlamaMLP):
    """Reads what it has made once more, and writes to the outputs of its linears."""

    def forward(self, x):
        y = super().forward(x)
        return y.add_(self.down_proj(self.up_proj(x + y).mul_(self.gate_proj(x))))


def in_place(model):
    for layer in model.model.layers:
        layer.mlp.__class__ = TwiceInPlace
    return model


@pytest.mark.parametrize("name", [*NAMES, "in place"])
def test_outputs_are_those_that_would_be_made_again(name, monkeypatch):
    model = in_place(zoo_model("llama")) if name == "in place" else zoo_model(name)
    paths = [target.path for target in discover(model).targets]
    factors, ranks = factors_of(model, paths), dict.fromkeys(paths, 5)
    found, output = refitted(model, factors, ranks), refit._Replay.output
    made = Counter()

    def always(_replay, path, forward, x):
        return forward(x)

    def counted(replay, path, forward, x):
        return output(replay, path, lambda x: (made.update([path]), forward(x))[1], x)

    monkeypatch.setattr(refit._Replay, "output", always)
    for path, matrix in refitted(model, factors, ranks).items():
        assert torch.equal(matrix, found[path]), path
    monkeypatch.setattr(refit._Replay, "output", counted)
    refitted(model, factors, ranks)
    if name != "in place":
        assert made == dict.fromkeys(paths, 2)  # Two batches.


# ------------------------------------------------------------------------------ the residual stream


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_what_writes_into_the_residual_stream(name, dtype):
    model = zoo_model(name, dtype)
    blocks = discover(model).blocks
    chain = record(model, blocks, IDS)
    assert [len(batch) for batch in chain.hidden] == [BATCH, len(IDS) - BATCH]
    stream = chain.hidden
    for block in blocks:
        for hidden, calls in zip(stream, chain.calls, strict=True):
            candidates = refit._may_write(block, hidden)
            seen = refit._watched(block, candidates, hidden, calls[block.path])
            writers = refit._residual_writers(candidates, hidden, *seen)
            assert writers == [f"{block.path}.{path}" for path in ZOO[name].writers]
        stream = chain.run(block, stream)


def test_blocks_that_are_no_chain_are_refused():
    model = zoo_model("llama")
    layer = model.model.layers[1]
    layer.register_forward_pre_hook(lambda _module, args: (2 * args[0], *args[1:]))
    with pytest.raises(
        ValueError, match=r"model\.layers\.1 doesn't read model\.layers\.0.*refit=F"
    ):
        compress(model, 0.7, IDS, rank_multiple=4, cache=False, progress=False)


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match=r"refit needs a model with a list of blocks.*refit=False"):
        next(refit_blocks(zoo_model("llama"), [], IDS, None, {}, {}.get))


def test_what_overflows_in_the_compressed_model_is_named():
    model = zoo_model("llama")
    paths = [path for group in paths_of("llama") for path in group]
    factors, ranks = factors_of(model, paths), dict.fromkeys(paths, 8)
    spoiled = factors["model.layers.0.self_attn.v_proj"]
    spoiled.SVh *= float("inf")
    with pytest.raises(FloatingPointError, match=r"layer model\.layers\.0\.self_attn\.[vo]_proj"):
        refitted(model, factors, ranks)


# ---------------------------------------------------------------------------------------- its worth


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_it_lowers_the_loss(name):
    dense, text = trained(name), tokens(64, 16, seed=77)
    losses = []
    for on in (False, True):
        options = {"refit": on, "samples": 64, "refit_samples": 64, "cache": False}
        options |= {"rank_multiple": 2, "lora_rank": 0, "progress": False}
        model, _ = compress(copy.deepcopy(dense), 0.4, text, **options)
        with torch.no_grad():
            losses.append(float(token_loss(model, text)[0]))
    assert losses[1] < 0.999 * losses[0]
