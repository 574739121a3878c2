"""The next-token loss of a causal language model, with the output head applied to few rows at once.

Logits of 512 tokens over 49,152 words are 100 MB in float32, and their gradient another 100 MB;
all of them at once halve the speed of training on a CPU. 64 rows stay in its cache.
"""

from __future__ import annotations

import weakref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hylora_kernels.model.modules import eval_mode

# model -> path of its body, None where there is none. A path keeps no module alive.
_bodies: weakref.WeakKeyDictionary[nn.Module, str | None] = weakref.WeakKeyDictionary()


def token_loss(
    model: nn.Module,
    ids: Tensor,
    chunk: int = 64,
    teacher: nn.Module | None = None,
    distill: float = 0.0,
) -> tuple[Tensor, int]:
    """ids int64 [n, L] -> (sum of the n (L - 1) next-token losses in nats, float32; n (L - 1)).

    chunk:   rows of logits made at a time.
    teacher: a causal LM with the same vocabulary. The loss is then (1 - distill) * cross-entropy +
             distill * cross-entropy against the teacher's distribution.

    Differentiable with respect to everything below the output head. Where `body_of` finds no body,
    and for a head that learns, the model's own logits are used, all at once.
    """
    labels = ids[:, 1:].flatten()
    body = None if _head_learns(model) else body_of(model, ids)
    teacher_body = body_of(teacher, ids) if teacher is not None and distill else None
    if body is None or (distill and teacher_body is None):
        with torch.no_grad():
            soft = _logits(teacher, ids) if distill else None
        return _mixed_loss(_logits(model, ids), labels, soft, distill), labels.numel()
    hidden, head = _hidden(body, ids), model.get_output_embeddings()
    with torch.no_grad():
        teacher_hidden = _hidden(teacher_body, ids) if distill else None
    teacher_head = teacher.get_output_embeddings() if distill else None
    loss = _ChunkedLoss.apply(hidden, head, labels, chunk, teacher_hidden, teacher_head, distill)
    return loss, labels.numel()


def _hidden(body: nn.Module, ids: Tensor) -> Tensor:
    """The hidden states [n (L - 1), d] that predict ids[:, 1:]."""
    return body(input_ids=ids, use_cache=False)[0][:, :-1].flatten(0, 1)


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)


def body_of(model: nn.Module, ids: Tensor) -> nn.Module | None:
    """The part of the model below its output head: body(ids)[0] are hidden states, and the model's
    logits are head(hidden), bit for bit. None if there is no such part.

    The candidate stands beside the head and holds the input embedding. The first call for a model
    tries it on four tokens of ids [n, L], which finds logits that are capped or scaled,
    hidden states that are scaled on the way to the head, and models that are built in another way.
    """
    if model not in _bodies:
        _bodies[model] = _verified_body(model, ids[:1, :4])
    path = _bodies[model]
    return None if path is None else model.get_submodule(path)


@torch.no_grad()
def _verified_body(model: nn.Module, ids: Tensor) -> str | None:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    owner = next((m for m in model.modules() if any(c is head for c in m.children())), nn.Module())
    candidate = next((c for c in owner.children() if embedding in c.modules()), embedding)
    if head is None or candidate is embedding:
        return None
    with eval_mode(model):
        logits = model(input_ids=ids, use_cache=False).logits
        try:
            by_head = head(candidate(input_ids=ids, use_cache=False)[0])
        except Exception:  # Another forward than a body's may fail in any way.
            return None
    if not torch.equal(logits, by_head.to(logits.dtype)):
        return None
    return next(path for path, module in model.named_modules() if module is candidate)


def _head_learns(model: nn.Module) -> bool:
    head = model.get_output_embeddings()
    parameters = () if head is None else head.parameters()
    return torch.is_grad_enabled() and any(p.requires_grad for p in parameters)


def _mixed_loss(
    logits: Tensor, labels: Tensor, teacher_logits: Tensor | None, distill: float
) -> Tensor:
    logits = logits.float()
    loss = F.cross_entropy(logits, labels, reduction="sum")
    if teacher_logits is None:
        return loss
    soft = F.cross_entropy(logits, teacher_logits.float().softmax(-1), reduction="sum")
    return (1 - distill) * loss + distill * soft


class _ChunkedLoss(torch.autograd.Function):
    """Computes the gradient of hidden in the forward, chunk by chunk: no logits are kept."""

    @staticmethod
    def forward(ctx, hidden, head, labels, chunk, teacher_hidden, teacher_head, distill):
        losses, grad = [], torch.empty_like(hidden) if hidden.requires_grad else None
        for start in range(0, len(labels), chunk):
            rows = slice(start, start + chunk)
            with torch.no_grad():
                teacher_logits = (
                    teacher_head(teacher_hidden[rows]) if teacher_head is not None else None
                )
            with torch.set_grad_enabled(grad is not None):
                part = hidden[rows].detach().requires_grad_(grad is not None)
                loss = _mixed_loss(head(part), labels[rows], teacher_logits, distill)
                if grad is not None:
                    (grad[rows],) = torch.autograd.grad(loss, part)
            losses.append(loss.detach())
        ctx.grad = grad
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx, dloss):
        return ctx.grad * dloss.to(ctx.grad.dtype), None, None, None, None, None, None
