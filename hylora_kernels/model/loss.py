"""The next-token loss of a causal language model, with the output head applied to few rows at once.

Logits of 512 tokens over 49,152 words are 100 MB in float32, and their gradient another 100 MB. A
CPU is quickest with 128 rows at a time: the KL over 511 and its gradient take a core 1.6 s, with 64
rows, whose products read the head twice as often, 1.8 s, and 2.2 s with all of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from tqdm import tqdm

from hylora_kernels.model.by_block import is_by_block
from hylora_kernels.model.modules import eval_mode

RowsOfLogits = Callable[[slice], Tensor]

# model -> path of its body, None where there is none. A path keeps no module alive.
_bodies: weakref.WeakKeyDictionary[nn.Module, str | None] = weakref.WeakKeyDictionary()


def token_loss(
    model: nn.Module,
    ids: Tensor,
    chunk: int = 128,
    teacher_logits: RowsOfLogits | None = None,
    distill: float = 0.0,
) -> tuple[Tensor, int]:
    """ids int64 [n, L] -> (sum of the n (L - 1) losses in nats, float32; n (L - 1)).

    chunk:          rows of logits made at a time.
    teacher_logits: rows of the n (L - 1) predictions -> the logits [rows, words] of a teacher with
                    the same vocabulary. The loss is then (1 - distill) * cross-entropy + distill *
                    KL(teacher || model), which is 0 where the two agree.

    Differentiable with respect to everything below the output head. Where `body_of` finds no body,
    and for a head that learns, the model's own logits are used, all at once.
    """
    labels = ids[:, 1:].flatten()
    rows_of = teacher_logits if distill else None
    if _head_learns(model) or head_of(model, ids) is None:
        soft = rows_of(slice(None)) if rows_of else None
        return _MixedLoss.apply(_logits(model, ids), labels, soft, distill), labels.numel()
    hidden, head = head_inputs(model, ids), model.get_output_embeddings()
    return _ChunkedLoss.apply(hidden, head, labels, chunk, rows_of, distill), labels.numel()


@torch.no_grad()
def mean_loss(model: nn.Module, ids: Tensor, progress: bool = False, label: str = "") -> float:
    """ids int64 [n, L] -> the mean next-token loss in nats, in eval(), one sequence at a time, or
    eight where each forward reads the model from its files."""
    total, count, device = 0.0, 0, next(model.parameters()).device
    rows = ids.split(8 if is_by_block(model) else 1)
    bar = tqdm(rows, desc=label, unit="seq", disable=not progress, leave=False)
    with eval_mode(model):
        for row in bar:
            loss, predictions = token_loss(model, row.to(device))
            total, count = total + float(loss), count + predictions
    return total / count


def head_inputs(model: nn.Module, ids: Tensor) -> Tensor:
    """What the output head reads to predict ids[:, 1:]: the last hidden states [n (L - 1), d].

    The logits [n (L - 1), words] themselves where `body_of` finds no body.
    """
    body = body_of(model, ids)
    if body is None:
        return _logits(model, ids)
    return body(input_ids=ids, use_cache=False)[0][:, :-1].flatten(0, 1)


def output_loss(hidden: Tensor, head: nn.Module, labels: Tensor, chunk: int = 128) -> Tensor:
    """hidden [rows, d], labels [rows] -> the sum of the losses, with its gradient of hidden, by a
    head that doesn't learn, as token_loss() makes them."""
    return _ChunkedLoss.apply(hidden, head, labels, chunk, None, 0.0)


def head_of(model: nn.Module, ids: Tensor) -> nn.Module | None:
    """The module that makes logits of head_inputs(); None where they are the logits."""
    return None if body_of(model, ids) is None else model.get_output_embeddings()


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


class _MixedLoss(torch.autograd.Function):
    """token_loss() of logits [rows, words], labels [rows] and a teacher's logits or None.

    The gradient, softmax(logits) - (1 - distill) onehot(labels) - distill softmax(teacher), is made
    in the forward, in place: a third of the passes over all words that autograd's would take.
    """

    @staticmethod
    def forward(ctx, logits, labels, teacher_logits, distill):
        log_p = logits.float().log_softmax(-1)
        share = 1.0 if teacher_logits is None else 1 - distill
        loss, q = share * F.nll_loss(log_p, labels, reduction="sum"), None
        if teacher_logits is not None:
            log_q = teacher_logits.float().log_softmax(-1)
            q = log_q.exp()
            loss = loss + distill * log_q.sub_(log_p).mul_(q).sum()
        if ctx.needs_input_grad[0]:
            gradient = log_p.exp_()
            if q is not None:
                gradient.sub_(q, alpha=distill)
            rows = torch.arange(len(labels), device=labels.device)
            gradient[rows, labels] -= share
            ctx.gradient = gradient.to(logits.dtype)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        return ctx.gradient * dloss.to(ctx.gradient.dtype), None, None, None


class _ChunkedLoss(torch.autograd.Function):
    """Computes the gradient of hidden in the forward, chunk by chunk: no logits are kept."""

    @staticmethod
    def forward(ctx, hidden, head, labels, chunk, teacher_logits, distill):
        losses, grad = [], torch.empty_like(hidden) if hidden.requires_grad else None
        for start in range(0, len(labels), chunk):
            rows = slice(start, start + chunk)
            soft = teacher_logits(rows) if teacher_logits else None
            with torch.set_grad_enabled(grad is not None):
                part = hidden[rows].detach().requires_grad_(grad is not None)
                loss = _MixedLoss.apply(head(part), labels[rows], soft, distill)
                if grad is not None:
                    (grad[rows],) = torch.autograd.grad(loss, part)
            losses.append(loss.detach())
        ctx.grad = grad
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx, dloss):
        return ctx.grad * dloss.to(ctx.grad.dtype), None, None, None, None, None
