"""The experts of a mixture as one linear each, in the place of a module that stacks their weights.

transformers 5 keeps the experts of a layer in two parameters of three dimensions, for example
gate_up_proj [E, 2 I, H] and down_proj [E, H, I]. ExpertLinears holds the same weights as E linears
for each of them, which are calibrated, compressed, trained and saved like any others.

No architecture is listed: shapes say how a stack is stored, and its module and the linears must
give the same outputs on random rows (`unstacked`).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

UP, DOWN = ("gate_up_proj", "up_proj"), "down_proj"
SCALES = (1.0, 30.0)  # Standard deviations of the rows tried: an activation may clamp large values.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # Relative; of any other dtype 0.03.


class ExpertLinears(nn.Module):
    """E experts, each y = down(gate(up(x))), called as the module that they replace is called.

    gate_up_proj or up_proj, down_proj: E linears each.
    stock: the replaced module without its stacks; it holds the activation.
    every: True calls each expert in a forward, those without rows too, for who watches.
    """

    def __init__(self, stock: nn.Module):
        """Raises ValueError with the reason if `stock` holds no stacks of experts."""
        super().__init__()
        up, transposed = _layout(stock)
        self.up_name, self.num_experts, self.every = up, len(getattr(stock, up)), False
        taken = set()
        for name in (up, DOWN):
            bias = f"{name}_bias" if getattr(stock, f"{name}_bias", None) is not None else None
            setattr(self, name, _linears(stock, name, bias, transposed))
            taken |= {name, bias}
        self.stock = copy.copy(stock)  # Shares all but the dict of its parameters.
        kept = {name: p for name, p in stock._parameters.items() if name not in taken}
        vars(self.stock)["_parameters"] = kept
        self.train(stock.training)

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor | None = None,
        top_k_weights: Tensor | None = None,
    ) -> Tensor:
        """hidden_states [T, H], top_k_index int [T, k], top_k_weights [T, k] -> [T, H].

        An index of E or more stands for no expert. Without an index, hidden_states is [E T, H],
        the T rows of expert 0 first; rows of zeros give zeros (Llama 4).
        """
        if top_k_index is None or top_k_weights is None:
            return self._in_order(hidden_states)
        k = top_k_index.shape[-1]
        x, index = hidden_states.flatten(0, -2), top_k_index.flatten()
        counts = torch.bincount(index, minlength=self.num_experts)[: self.num_experts].tolist()
        slots = index.argsort(stable=True)[: sum(counts)]  # Slot t k + j: the j-th expert of row t.
        y = [
            self._expert(e, x[part // k])
            for e, part in enumerate(slots.split(counts))
            if self.every or len(part)
        ]
        out = x.new_zeros(len(index), x.shape[-1])
        if y:
            y = torch.cat(y) * top_k_weights.flatten()[slots, None]
            out = out.to(y.dtype).index_copy(0, slots, y)
        return out.unflatten(0, (-1, k)).sum(1).to(x.dtype).view_as(hidden_states)

    def _in_order(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(self.num_experts, -1, hidden_states.shape[-1])
        outputs = []
        for e, rows in enumerate(x):
            routed = rows.any(1).nonzero().squeeze(1)
            out = torch.zeros_like(rows)
            if self.every or len(routed):
                out = out.index_copy(0, routed, self._expert(e, rows[routed]).to(out.dtype))
            outputs.append(out)
        return torch.cat(outputs).view_as(hidden_states)

    def _expert(self, e: int, x: Tensor) -> Tensor:
        stock, h = self.stock, getattr(self, self.up_name)[e](x)
        if hasattr(stock, "_apply_gate") and self.up_name == UP[0]:
            h = stock._apply_gate(h)
        elif self.up_name == UP[0]:
            gate, up = h.chunk(2, dim=-1)
            h = stock.act_fn(gate) * up
        else:
            h = stock.act_fn(h)
        y = self.down_proj[e](h)
        return stock.post_expert_norm(y) if getattr(stock, "has_post_expert_norm", False) else y


def unstacked(stock: nn.Module) -> ExpertLinears:
    """The experts of `stock` as linears, whose weights are views of its own.

    Raises ValueError with the reason if it holds none, or computes something else than they do.
    """
    if "forward" in vars(stock) or stock._forward_hooks or stock._forward_pre_hooks:
        raise ValueError("its forward is hooked or replaced")
    experts = ExpertLinears(stock)
    if not _same_outputs(stock, experts):
        raise ValueError(f"{type(stock).__name__} doesn't compute down(gate(up x)) of each expert")
    return experts


def unstack(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Put ExpertLinears in the place of the model's stacks of experts, without copying a weight.

    Returns (path -> the module replaced, which `restack` puts back; name of a parameter of a stack
    left alone -> the reason).
    """
    replaced, reasons, seen = {}, {}, set()
    stacks = [(path, m) for path, m in model.named_modules(remove_duplicate=False) if _is_stack(m)]
    twice = {id(m) for _, m in stacks if id(m) in seen or seen.add(id(m))}
    for path, stock in stacks:
        try:
            if id(stock) in twice:
                raise ValueError("used in several places")
            experts = unstacked(stock)
        except ValueError as error:
            reasons |= {
                f"{path}.{n}": str(error) for n, p in stock._parameters.items() if p is not None
            }
        else:
            model.set_submodule(path, experts)
            replaced[path] = stock
    return replaced, reasons


def restack(model: nn.Module, replaced: dict[str, nn.Module]) -> None:
    """Undo `unstack`."""
    for path, stock in replaced.items():
        model.set_submodule(path, stock)


def settle(model: nn.Module, replaced: dict[str, nn.Module], selected: Iterable[str]) -> None:
    """Undo `unstack` of the stacks of which no linear is selected, by path; free the weights of the
    others from their stack."""
    selected = list(selected)
    for path, stock in replaced.items():
        if any(linear.startswith(f"{path}.") for linear in selected):
            own_weights(model.get_submodule(path))
        else:
            model.set_submodule(path, stock)


@contextmanager
def all_experts_called(model: nn.Module) -> Iterator[None]:
    """Each forward inside calls every expert, those that no token is routed to with no rows."""
    modules = [module for module in model.modules() if isinstance(module, ExpertLinears)]
    for module in modules:
        module.every = True
    try:
        yield
    finally:
        for module in modules:
            module.every = False


def unstack_for(model: nn.Module, linears: Iterable[str]) -> None:
    """Put ExpertLinears in the place of each stack that must hold one of these linears, by path.

    The model may be on the meta device. Raises ValueError as ExpertLinears does.
    """
    stacks = filter(None, map(stack_of, linears))
    for path in {name.rpartition(".")[0] for name in stacks}:
        try:
            stock = model.get_submodule(path)
        except AttributeError:
            continue
        if _is_stack(stock):
            model.set_submodule(path, ExpertLinears(stock))


def stack_of(path: str) -> str | None:
    """The name of the stack that an expert's linear was taken from, by its path; None for others'.

    model.layers.0.mlp.experts.down_proj.3 -> model.layers.0.mlp.experts.down_proj
    """
    stack, _, expert = path.rpartition(".")
    return stack if expert.isdecimal() and stack.rpartition(".")[2] in (*UP, DOWN) else None


def own_weights(experts: nn.Module) -> None:
    """Copy each weight and bias that is a view of a stack, so that the stack is freed."""
    for p in experts.parameters():
        if p.untyped_storage().nbytes() != p.nbytes:
            p.data = p.data.clone(memory_format=torch.contiguous_format)


def _is_stack(module: nn.Module) -> bool:
    names = {name for name, p in module._parameters.items() if p is not None and p.ndim == 3}
    return DOWN in names and any(up in names for up in UP)


def _layout(stock: nn.Module) -> tuple[str, bool]:
    """(name of the first projection, True if weights are stored [inputs, outputs])."""
    if not _is_stack(stock):
        raise ValueError("no stack of experts")
    up_name = next(name for name in UP if stock._parameters.get(name) is not None)
    up, down = stock._parameters[up_name], stock._parameters[DOWN]
    for name, stack in ((up_name, up), (DOWN, down)):
        if type(stack) is not nn.Parameter or not stack.is_floating_point():
            raise ValueError(f"{name} is no plain floating parameter")
    (E, *shape), (E_down, a, b) = up.shape, down.shape
    gate = 2 if up_name == UP[0] else 1
    straight, transposed = shape == [gate * b, a], shape == [b, gate * a]
    if E_down != E or not (straight or transposed):
        raise ValueError(f"{up_name} {list(up.shape)} and {DOWN} {list(down.shape)} don't fit")
    if straight and transposed:  # Squares: the module says it, and the outputs show if that's true.
        transposed = getattr(stock, "is_transposed", False)
    return up_name, transposed


def _linears(stock: nn.Module, name: str, bias: str | None, transposed: bool) -> nn.ModuleList:
    stack = stock._parameters[name]
    linears = []
    for e, weight in enumerate(stack.detach()):
        weight = weight.T if transposed else weight
        linear = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
        linear.weight = nn.Parameter(weight, stack.requires_grad)
        if bias is not None:
            biases = stock._parameters[bias]
            linear.bias = nn.Parameter(biases.detach()[e], biases.requires_grad)
        linears.append(linear)
    return nn.ModuleList(linears)


@torch.no_grad()
def _same_outputs(stock: nn.Module, experts: ExpertLinears) -> bool:
    up = getattr(experts, experts.up_name)
    E, weight = experts.num_experts, up[0].weight
    generator = torch.Generator("cpu").manual_seed(0)
    tokens, k = 2 * E, min(2, E)

    def rows(scale):
        x = torch.randn(tokens, weight.shape[1], generator=generator, device="cpu").to(weight)
        return x * (scale / (x @ weight.T).std().clamp_min(1e-20))

    arguments = []
    if len(inspect.signature(stock.forward).parameters) > 1:  # Else its rows come in order.
        index = (torch.arange(tokens * k, device=weight.device) % E).view(tokens, k)
        arguments = [index, torch.rand(tokens, k, generator=generator, device="cpu").to(weight)]
    training, tolerance = stock.training, TOLERANCE.get(weight.dtype, 0.03)
    stock.eval(), experts.eval()
    try:
        for scale in SCALES:
            x = rows(scale)
            x[1::3] = 0 if not arguments else x[1::3]
            want, got = stock(x, *arguments), experts(x, *arguments)
            if not (got - want).norm() <= tolerance * want.norm():
                return False
    except Exception:  # The module may want other arguments, or fail in any way.
        return False
    finally:
        stock.train(training), experts.train(training)
    return True
