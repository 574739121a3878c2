"""token_loss against full logits in float64: value, gradient, chunks, other heads, distillation."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import architectures, tiny
from transformers import Gemma2Config, GPT2Config, GPTNeoXConfig, OPTConfig

from hylora_kernels.model.loss import body_of, head_inputs, head_of, token_loss

TINY = {"vocab_size": tiny.WORDS, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def gemma2():
    """Soft-caps its logits, at 2 here: they are not head(hidden)."""
    return tiny.causal_lm(
        Gemma2Config(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            initializer_range=0.2,
            final_logit_softcapping=2.0,
            **TINY,
        )
    )


def adapters(model):
    return {n: p for n, p in model.named_parameters() if n.endswith((".A", ".B"))}


def frozen_but_adapters(model):
    model.requires_grad_(False)
    for parameter in adapters(model).values():
        parameter.requires_grad_()
    return model


def full_logits(model, ids):
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return logits.flatten(0, 1)


def formula(model, ids, teacher=None, distill=0.0):
    """The loss from all logits at once, in the model's dtype."""
    log_p = full_logits(model, ids).log_softmax(-1)
    loss = F.nll_loss(log_p, ids[:, 1:].flatten(), reduction="sum")
    if teacher is None:
        return loss
    q = full_logits(teacher, ids).softmax(-1).detach()
    return (1 - distill) * loss + distill * (q * (q.log() - log_p)).sum()


def value_and_gradients(model, make_loss):
    model.zero_grad()
    loss = make_loss(model)
    loss.backward()
    return loss.detach().double(), {n: p.grad.double() for n, p in adapters(model).items()}


def assert_as_in_float64(model, make_loss, make_truth, tolerance=1e-5):
    exact = copy.deepcopy(model).double()
    want, want_grads = value_and_gradients(exact, make_truth)
    got, got_grads = value_and_gradients(model, make_loss)
    torch.testing.assert_close(got, want, rtol=tolerance, atol=0)
    largest = max(grad.norm() for grad in want_grads.values())
    for name, grad in want_grads.items():
        error = (got_grads[name] - grad).norm() / largest
        assert error < 10 * tolerance, f"{name}: error {error:.2g} of the largest gradient"


@pytest.fixture
def model():
    return frozen_but_adapters(tiny.adapted(tiny.llama()))


@pytest.mark.parametrize("chunk", [1, 7, 16, 33, 64, 1000])
@pytest.mark.parametrize("shape", [(1, 2), (3, 12)])
def test_value_and_gradient(model, shape, chunk):
    """33 predictions (or one): 7 doesn't divide them, 33 is all of them, 1000 more than all."""
    ids = tiny.tokens(*shape)
    loss, count = token_loss(model, ids, chunk)
    assert loss.dtype == torch.float32 and loss.shape == () and count == shape[0] * (shape[1] - 1)
    assert_as_in_float64(model, lambda m: token_loss(m, ids, chunk)[0], lambda m: formula(m, ids))


def test_chunks_never_hold_all_logits(model):
    rows = []
    hook = model.lm_head.register_forward_hook(lambda m, args, out: rows.append(len(args[0])))
    token_loss(model, tiny.tokens(2, 12), chunk=8)
    hook.remove()
    assert rows[-3:] == [8, 8, 6] and body_of(model, tiny.tokens(2, 12)) is model.model


def test_scaled_backward(model):
    """The gradient is made in the forward; what comes into the backward must still scale it."""
    ids = tiny.tokens(2, 9)
    _, once = value_and_gradients(model, lambda m: token_loss(m, ids)[0])
    _, four_times = value_and_gradients(model, lambda m: 4 * token_loss(m, ids)[0])
    for name, grad in once.items():
        assert torch.equal(four_times[name], 4 * grad)


def test_without_gradient(model):
    ids = tiny.tokens(2, 9)
    with_gradient = token_loss(model, ids)[0]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            loss = token_loss(model, ids)[0]
        assert not loss.requires_grad and torch.equal(loss, with_gradient.detach())


def test_bfloat16_sums_in_float32(model):
    model = model.bfloat16()
    ids = tiny.tokens(4, 32)
    loss, _ = token_loss(model, ids)
    assert loss.dtype == torch.float32
    logits = full_logits(model, ids).double()
    want = F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=0)
    loss.backward()
    assert all(p.grad.dtype == torch.bfloat16 for p in adapters(model).values())


def test_soft_capped_logits_take_the_other_path():
    model = frozen_but_adapters(tiny.adapted(gemma2()))
    ids = tiny.tokens(2, 9)
    token_loss(model, ids)
    assert body_of(model, ids) is None
    head_alone = F.cross_entropy(
        model.lm_head(model.model(ids)[0])[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    )
    loss, count = token_loss(model, ids)
    assert (head_alone - loss / count).abs() > 0.1  # The cap matters here.
    assert_as_in_float64(model, lambda m: token_loss(m, ids)[0], lambda m: formula(m, ids))


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2, **TINY),
        GPTNeoXConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            initializer_range=0.2,
            **TINY,
        ),
        OPTConfig(
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=16,
            init_std=0.2,
            **TINY,
        ),
    ],
    ids=lambda config: config.model_type,
)
def test_other_architectures(config):
    model, ids = tiny.causal_lm(config), tiny.tokens(2, 9)
    with torch.no_grad():
        got = token_loss(model.requires_grad_(False), ids, chunk=5)[0].double()
        want = formula(copy.deepcopy(model).double(), ids)
    assert body_of(model, ids) is model.base_model
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("gemma3", "model"),
        ("llama4", "language_model.model"),  # The base model of the whole is the whole.
        ("granite", None),  # Divides its logits.
        ("cohere", None),  # Multiplies them.
        ("minicpm3", None),  # Divides the hidden states on the way to the head.
    ],
)
def test_the_body_is_found_or_done_without(kind, body):
    model, ids = architectures.tiny(kind).requires_grad_(False), tiny.tokens(2, 9)
    for name, value in (("logits_scaling", 3.0), ("logit_scale", 0.5), ("dim_model_base", 16)):
        for owner in (model, model.config):
            if name in vars(owner):
                setattr(owner, name, value)
    found = body_of(model, ids)
    assert found is (None if body is None else model.get_submodule(body))
    with torch.no_grad():
        got, want = token_loss(model, ids, chunk=5)[0], formula(model, ids)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=0)


@pytest.mark.parametrize("distill", [0.25, 0.7, 1.0])
@pytest.mark.parametrize("make", [tiny.llama, gemma2], ids=["head", "logits"])
def test_distillation(make, distill):
    model, teacher = frozen_but_adapters(tiny.adapted(make())), make().requires_grad_(False)
    exact_teacher, ids = copy.deepcopy(teacher).double(), tiny.tokens(2, 9)
    soft = full_logits(teacher, ids).detach()
    assert_as_in_float64(
        model,
        lambda m: token_loss(m, ids, 5, soft.__getitem__, distill)[0],
        lambda m: formula(m, ids, exact_teacher, distill),
    )


@pytest.mark.parametrize("make", [tiny.llama, gemma2], ids=["head", "logits"])
def test_no_divergence_no_gradient(make):
    model, ids = frozen_but_adapters(tiny.adapted(make())), tiny.tokens(2, 9)
    same = full_logits(model, ids).detach()
    loss, grads = value_and_gradients(
        model, lambda m: token_loss(m, ids, 5, same.__getitem__, 1.0)[0]
    )
    _, others = value_and_gradients(model, lambda m: token_loss(m, ids, 5)[0])
    assert abs(loss) < 1e-6
    assert max(g.norm() for g in grads.values()) < 1e-5 * max(g.norm() for g in others.values())


@pytest.mark.parametrize("make", [tiny.llama, gemma2], ids=["head", "logits"])
@torch.no_grad()
def test_what_the_head_reads_makes_the_logits(make):
    model, ids = make(), tiny.tokens(2, 9)
    states, head = head_inputs(model, ids), head_of(model, ids)
    logits = states if head is None else head(states)
    assert torch.equal(logits, full_logits(model, ids))
    assert states.shape == (16, tiny.WORDS if make is gemma2 else 32)


def test_trainable_head_gets_its_gradient(model):
    """The chunks make no gradient for the head, so a head that needs one goes the full way."""
    ids = tiny.tokens(2, 9)
    model.lm_head.weight.requires_grad_()
    exact = copy.deepcopy(model).double()
    token_loss(model, ids)[0].backward()
    formula(exact, ids).backward()
    got, want = model.lm_head.weight.grad.double(), exact.lm_head.weight.grad
    assert (got - want).norm() < 1e-4 * want.norm()


def test_adapter_in_the_head_gets_its_gradient():
    model = frozen_but_adapters(tiny.adapted(tiny.llama(), names=(*tiny.LAYERS, "lm_head")))
    ids = tiny.tokens(2, 9)
    assert "lm_head.A" in adapters(model)
    assert_as_in_float64(model, lambda m: token_loss(m, ids)[0], lambda m: formula(m, ids))


def test_probe_leaves_train_mode_alone(model):
    model.train()
    token_loss(model, tiny.tokens(1, 5))
    assert model.training and model.lm_head.training
