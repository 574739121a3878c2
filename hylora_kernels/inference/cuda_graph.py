"""Decoder steps on a GPU: one CUDA graph a step, over a static cache.

A step from Python launches hundreds of kernels, which costs the host more than they run. A graph
replays them all at once. It is captured for sizes: a batch of 1, 2, 4, ... 64 sequences and a cache
of 256, 512, ... tokens. A prompt, a batch or a length in between takes the next larger size, so
nothing is captured or compiled again when lengths change. When the cache is full, its contents move
to one of twice the length. A prompt is computed by the model's modules, called from Python.

Groups of linears, which optimize_for_inference makes on a GPU, are one launch each in a graph.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer

from hylora_kernels.inference.modules import Modules
from hylora_kernels.inference.step_attention import attending

BATCHES = (1, 2, 4, 8, 16, 32, 64)
LEAST_LENGTH = 256  # tokens that a cache holds at first; it doubles when it is full
MOST_COMPILED = 256  # sizes that torch.compile makes code for
MOST_SIZES = 4  # whose graphs and caches are kept; the one longest unused goes
MOST_DIFFERENCE = 0.05  # of logits, relative: a wrong mask or position gives 0.5 and more
ARGUMENTS = ("attention_mask", "position_ids", "past_key_values")


def why_not(model: nn.Module) -> str:
    """The reason why this model's steps can't be captured, "" if they can.

    The last question is one of numbers: a probe, one short and one padded sequence, decodes a
    token over a static cache as a graph would, and as the model does by itself.
    """
    devices = {tensor.device for tensor in _tensors(model)}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        return f"a CUDA graph needs the model on one GPU, got {', '.join(map(str, devices))}"
    return why_no_static_step(model)


def why_no_static_step(model: nn.Module) -> str:
    """The same for any device."""
    missing = [n for n in ARGUMENTS if n not in inspect.signature(model.forward).parameters]
    if missing:
        return f"{type(model).__name__}.forward takes no {missing[0]}"
    attention = model.config.get_text_config()._attn_implementation
    if attention != "sdpa":
        return f"a graph needs attention 'sdpa', the model has {attention!r}"
    try:
        cache = StaticCache(config=model.config, max_cache_len=LEAST_LENGTH)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return f"transformers makes no static cache for a {type(model).__name__}: {error}"
    for number, layer in enumerate(cache.layers):
        if type(layer) is not StaticLayer:
            return (
                f"layer {number} keeps a {type(layer).__name__}, whose state a graph can't follow"
            )
        if not isinstance(getattr(layer, "cumulative_length", None), Tensor):
            return "this transformers counts the tokens of a static cache in Python"
    return _why_not_by_numbers(model)


@torch.inference_mode(False)
@torch.no_grad()
def _why_not_by_numbers(model: nn.Module) -> str:
    device = next(iter(_tensors(model))).device
    ids = torch.arange(8, device=device).view(2, 4) % model.config.get_text_config().vocab_size
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    given, output = _prefill(model, ids, mask)
    state = _State(2, LEAST_LENGTH, device)
    state.take(model, output.past_key_values, mask, given["position_ids"][:, -1:])
    state.token.copy_(ids[:, :1])
    by_graph = state.step(model).float()
    more = torch.cat((mask, mask.new_ones(2, 1)), 1)
    expected = model(
        input_ids=ids[:, :1],
        attention_mask=more,
        position_ids=given["position_ids"][:, -1:] + 1,
        past_key_values=output.past_key_values,
    ).logits[:, -1]
    error = float((by_graph - expected.float()).norm() / expected.float().norm())
    if error <= MOST_DIFFERENCE:
        return ""
    return f"over a static cache its logits differ by {error:.2g}, relative"


class CudaGraphs:
    """Runs a model on the tokens of up to 64 sequences: prompts by its modules, steps by a graph.

    A model that has been moved, restored or given other weights is captured again; one that can't
    be any more is decoded by its modules from the next prompt on.

    capture, why_not: captured() and why_not(), or what a test gives in their place.
    compiled: as Decoder's.
    """

    likeliest = None  # the likeliest tokens: found from the logits

    def __init__(
        self,
        model: nn.Module,
        capture: Callable | None = None,
        why_not: Callable[[nn.Module], str] = why_not,
        compiled: bool = False,
    ) -> None:
        self.model, self.capture, self.why_not = model, capture or captured, why_not
        self.stepped = torch.compile(model, dynamic=False) if compiled else model
        self.states: OrderedDict[tuple[int, int], _State] = OrderedDict()
        self.seen: list[Tensor] = []
        self.modules: Modules | None = None
        self.reset()

    @property
    def name(self) -> str:
        return "cuda graph" if self.modules is None else self.modules.name

    def reset(self) -> None:
        """Forget the sequences; graphs and caches stay for the next ones."""
        if self.modules is not None:
            self.modules.reset()
        self.count = self.tokens = 0  # sequences, tokens of each
        self.state: _State | None = None

    @torch.inference_mode(False)  # tensors that later steps write to may be no inference tensors
    @torch.no_grad()
    def prefill(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids and mask int64 [n, L], zeros of the mask on the left -> logits [n, words] of each
        sequence's last token."""
        self.reset()
        self._follow_weights()
        if self.modules is not None:
            return self.modules.prefill(ids, mask)
        given, output = _prefill(self.model, ids, mask)
        self.count, self.tokens = ids.shape
        self.state = self._state_for(self.count, self.tokens + 1, ids.device)
        self.state.take(self.model, output.past_key_values, mask, given["position_ids"][:, -1:])
        return output.logits[:, -1]

    @torch.inference_mode(False)
    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """tokens int64 [n] -> logits [n, words] of the tokens after them."""
        if self.modules is not None:
            return self.modules.step(tokens)
        assert self.state is not None, "prefill comes first"
        if self.tokens == self.state.length:
            larger = self._state_for(self.count, self.tokens + 1, tokens.device)
            larger.take_over(self.model, self.state)
            self.state = larger
        state = self.state
        state.token[: self.count].copy_(tokens[:, None])
        if state.replay is None:
            # Code is compiled anew for each size, and models of one class share the limit.
            with torch._dynamo.config.patch(recompile_limit=MOST_COMPILED):
                state.replay = state.captured_by(self.capture, self.stepped)
        state.replay()
        self.tokens += 1
        assert state.logits is not None
        return state.logits[: self.count].clone()  # the next replay writes over them

    def _state_for(self, count: int, tokens: int, device: torch.device) -> _State:
        batch = next(size for size in BATCHES if size >= count)
        key = batch, length_for(tokens)
        if key not in self.states:
            self.states[key] = _State(*key, device)
        self.states.move_to_end(key)
        if len(self.states) > MOST_SIZES:
            self.states.popitem(last=False)
        return self.states[key]

    def _follow_weights(self) -> None:
        """Drop the graphs if a tensor of the model lies elsewhere than when they were captured.

        `seen` holds on to the memory, so that a graph never reads what has been freed.
        """
        now = [tensor.detach() for tensor in _tensors(self.model)]
        if self.seen and [t.data_ptr() for t in now] != [t.data_ptr() for t in self.seen]:
            self.states.clear()
            self.modules = Modules(self.model) if self.why_not(self.model) else None
        self.seen = now


def length_for(tokens: int) -> int:
    """The least cache length, a power of two and at least 256, that holds so many tokens."""
    return max(LEAST_LENGTH, 1 << (tokens - 1).bit_length())


@dataclass(eq=False)
class _State:
    """All that a step of one size reads and writes, always in the same memory.

    token, position: int64 [batch, 1], of the next step; mask: bool [batch, 1, 1, length], the
    tokens that it sees. Rows past the sequences' number repeat the first one.
    """

    batch: int
    length: int
    device: torch.device
    cache: StaticCache | None = None
    logits: Tensor | None = None
    replay: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        shape, device = (self.batch, 1), self.device
        self.token = torch.zeros(shape, dtype=torch.int64, device=device)
        self.position = torch.zeros(shape, dtype=torch.int64, device=device)
        self.mask = torch.zeros(*shape, 1, self.length, dtype=torch.bool, device=device)
        self.place = torch.zeros(1, dtype=torch.int64, device=device)  # of the next token

    def take(self, model: nn.Module, cache, mask: Tensor, position: Tensor) -> None:
        """Begin after a prompt: cache of keys [n, heads, L, size], mask [n, L], position [n, 1] of
        the last token."""
        tokens = mask.shape[1]
        if self.cache is None:
            self.cache = StaticCache(config=model.config, max_cache_len=self.length)
        self.cache.reset()
        for mine, given in zip(self.cache.layers, cache.layers, strict=True):
            mine.update(
                self._all(given.keys[:, :, :tokens]), self._all(given.values[:, :, :tokens])
            )
        self.mask.zero_()
        self.mask[:, 0, 0, :tokens] = self._all(mask).bool()
        self.position.copy_(self._all(position) + 1)
        self.place.fill_(tokens)

    def take_over(self, model: nn.Module, other: _State) -> None:
        """Go on where a state of the same batch and less length has stopped: it is full."""
        self.take(model, other.cache, other.mask[:, 0, 0], other.position - 1)

    def step(self, model: nn.Module) -> Tensor:
        """One token for every row; logits [batch, words]."""
        self.mask.index_fill_(3, self.place, True)
        with attending(model):
            output = model(
                input_ids=self.token,
                attention_mask=self.mask,
                position_ids=self.position,
                past_key_values=self.cache,
                use_cache=True,
            )
        self.position.add_(1)
        self.place.add_(1)
        return output.logits[:, -1]

    def changing(self) -> list[Tensor]:
        """All that a step changes, but for keys and values past the last token."""
        assert self.cache is not None
        lengths = [layer.cumulative_length for layer in self.cache.layers]
        return [self.mask, self.position, self.place, *lengths]

    def captured_by(self, capture: Callable, model: nn.Module) -> Callable[[], None]:
        """A function that makes a step and leaves its logits; nothing has changed yet."""
        changing = self.changing()
        before = [tensor.clone() for tensor in changing]

        def run() -> None:
            self.logits = self.step(model)

        def put_back() -> None:
            torch._foreach_copy_(changing, before)

        try:
            return capture(run, put_back, self.device)
        except BaseException:  # an interruption, too: compiling takes seconds
            put_back()
            raise

    def _all(self, rows: Tensor) -> Tensor:
        """[n, ...] -> [batch, ...]: the first row again and again at the end."""
        missing = self.batch - len(rows)
        return torch.cat((rows, rows[:1].expand(missing, *rows.shape[1:]))) if missing else rows


def captured(
    run: Callable[[], None], put_back: Callable[[], None], device: torch.device
) -> Callable[[], None]:
    """run() in a CUDA graph; put_back() undoes what a run changes.

    cuBLAS keeps a workspace for each stream until somebody clears them all, which torch.compile
    does. The one of the graph is made while it is captured, in the graph's own memory, and no one
    else's: a graph that took the stream's would go on to use memory that has been given back. To
    that end all are cleared here, too.
    """
    with torch.cuda.device(device):
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            for _ in range(2):  # compiles what it launches, allocates what is kept from then on
                run()
                put_back()
        here.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        torch._C._cuda_clearCublasWorkspaces()
        try:
            with torch.cuda.graph(graph, stream=aside):
                run()
        finally:
            torch._C._cuda_clearCublasWorkspaces()
    return graph.replay


def _prefill(model: nn.Module, ids: Tensor, mask: Tensor):
    """(the positions given, the model's output) for a prompt, padded on the left."""
    given = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        given["logits_to_keep"] = 1
    output = model(
        input_ids=ids,
        attention_mask=mask,
        past_key_values=DynamicCache(config=model.config),
        use_cache=True,
        **given,
    )
    return given, output


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
