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

_plain_heads: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


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

    Differentiable with respect to everything below the output head, which must be frozen. A probe
    on four tokens finds models whose logits are more than head(hidden) (soft-capping, scaling);
    their own logits are used, all at once.
    """
    labels = ids[:, 1:].flatten()
    if not (has_plain_head(model, ids) and (not distill or has_plain_head(teacher, ids))):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        soft = None if not distill else _logits(teacher, ids)
        return _mixed_loss(logits, labels, soft, distill), labels.numel()
    hidden = _hidden(model, ids)
    head = model.get_output_embeddings()
    with torch.no_grad():
        teacher_hidden = _hidden(teacher, ids) if distill else None
    teacher_head = teacher.get_output_embeddings() if distill else None
    loss = _ChunkedLoss.apply(hidden, head, labels, chunk, teacher_hidden, teacher_head, distill)
    return loss, labels.numel()


def _hidden(model: nn.Module, ids: Tensor) -> Tensor:
    """The hidden states [n (L - 1), d] that predict ids[:, 1:]."""
    return model.base_model(input_ids=ids, use_cache=False)[0][:, :-1].flatten(0, 1)


@torch.no_grad()
def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)


def has_plain_head(model: nn.Module, ids: Tensor) -> bool:
    """True if the logits are head(hidden), bit for bit, and the head needs no gradient now. The
    first call for a model runs it on four tokens."""
    if model not in _plain_heads:
        probe = ids[:1, :4]
        with eval_mode(model), torch.no_grad():
            by_head = model.get_output_embeddings()(
                model.base_model(input_ids=probe, use_cache=False)[0]
            )
            _plain_heads[model] = torch.equal(
                model(input_ids=probe, use_cache=False).logits, by_head
            )
    head_learns = torch.is_grad_enabled() and any(
        p.requires_grad for p in model.get_output_embeddings().parameters()
    )
    return _plain_heads[model] and not head_learns


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
