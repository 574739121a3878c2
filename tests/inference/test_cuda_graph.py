"""Decoder steps by CUDA graphs, with a stand-in for the graph: a CPU computes each replay, and a
step that asks for a number of the device fails. What a graph itself does is not seen here."""

from __future__ import annotations

import re

import pytest
import torch
from helpers import tiny
from helpers.capturing import NoNumberAsked
from helpers.zoo import ZOO, zoo_model
from transformers import FalconConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hylora_kernels import Decoder, optimize_for_inference
from hylora_kernels.inference import cuda_graph, decoder, step_attention
from hylora_kernels.inference.cuda_graph import CudaGraphs, why_no_static_step

NEW = 12
CAPTURED = ("llama", "qwen2", "qwen3", "gpt_neox")


class Capture:
    """A graph's stand-in. A replay runs in the very memory that was captured."""

    def __init__(self):
        self.count = 0

    def __call__(self, run, put_back, device):
        self.count += 1
        for _ in range(2):
            run()
            put_back()

        def replay():
            with NoNumberAsked():
                run()

        return replay


@pytest.fixture
def capture():
    return Capture()


@pytest.fixture
def small_caches(monkeypatch):
    monkeypatch.setattr(cuda_graph, "LEAST_LENGTH", 8)


def greedy(runtime, ids, mask=None, new=NEW):
    """The next tokens [n, new] by a runtime."""
    mask = torch.ones_like(ids) if mask is None else mask
    found = [runtime.prefill(ids, mask).argmax(-1)]
    for _ in range(new - 1):
        found.append(runtime.step(found[-1]).argmax(-1))
    return torch.stack(found, 1)


@torch.no_grad()
def by_transformers(model, ids, mask=None, new=NEW):
    mask = torch.ones_like(ids) if mask is None else mask
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    found = model.generate(ids, attention_mask=mask, **options)
    return found[:, ids.shape[1] :]


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_tokens_are_those_of_transformers(batch, capture, small_caches, monkeypatch):
    queries = []

    def attend(module, query, *given, **named):
        queries.append(query.shape[2])
        return step_attention.attend(module, query, *given, **named)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, step_attention.NAME, attend)
    model = tiny.adapted(tiny.llama())
    ids, mask = tiny.tokens(batch, 5), torch.ones(batch, 5, dtype=torch.int64)
    mask[0, :2] = 0
    graphs = CudaGraphs(model, capture)
    assert torch.equal(greedy(graphs, ids, mask), by_transformers(model, ids, mask))
    rows = 4 if batch == 3 else batch
    assert set(queries) == {1}, "steps alone, not the prompt"
    assert list(graphs.states) == [(rows, 8), (rows, 16)] and graphs.tokens == 5 + NEW - 1


@pytest.mark.parametrize("optimised", [False, True])
def test_compiled_steps_make_the_same_tokens(optimised, capture, small_caches, monkeypatch):
    compiled, steps, whole = [], [], torch.compile

    def counted(graph, inputs):
        steps.append(graph)
        return graph.forward

    def by_eager(model, **options):
        compiled.append(options)
        return whole(model, backend=counted, **options)

    monkeypatch.setattr(torch, "compile", by_eager)
    model = tiny.adapted(tiny.llama())
    if optimised:
        optimize_for_inference(model)
    ids = tiny.tokens(2, 5)
    graphs = CudaGraphs(model, capture, compiled=True)
    assert torch.equal(greedy(graphs, ids), by_transformers(model, ids))
    assert compiled == [{"dynamic": False}] and capture.count == 2 and steps
    torch.compiler.reset()


def test_an_interrupted_capture_changes_nothing(capture):
    model, interrupted = tiny.llama(), []

    def interrupt(run, put_back, device):
        if interrupted:
            return capture(run, put_back, device)
        run()
        interrupted.append(1)
        raise KeyboardInterrupt

    graphs, ids = CudaGraphs(model, interrupt), tiny.tokens(2, 4)
    token = graphs.prefill(ids, torch.ones_like(ids)).argmax(-1)
    with pytest.raises(KeyboardInterrupt):
        graphs.step(token)
    found = [token]
    for _ in range(3):
        found.append(graphs.step(found[-1]).argmax(-1))
    assert torch.equal(torch.stack(found, 1), by_transformers(model, ids, new=4))


def test_nothing_is_captured_again_when_lengths_change(capture, small_caches):
    model = tiny.llama()
    graphs = CudaGraphs(model, capture)
    for count, length, captures in ((1, 3, 1), (1, 6, 2), (1, 2, 2), (3, 3, 3), (4, 4, 3)):
        ids = tiny.tokens(count, length)
        assert torch.equal(greedy(graphs, ids, new=4), by_transformers(model, ids, new=4))
        assert capture.count == captures, (count, length)


def test_the_size_longest_unused_goes(capture, small_caches):
    graphs = CudaGraphs(tiny.llama(), capture)
    for count in (1, 2, 4, 1, 8, 16):
        greedy(graphs, tiny.tokens(count, 3), new=2)
    assert [batch for batch, _ in graphs.states] == [4, 1, 8, 16]
    with pytest.raises(StopIteration):
        graphs.prefill(tiny.tokens(65, 3), torch.ones(65, 3, dtype=torch.int64))


def test_logits_stay_what_they_were(capture):
    graphs = CudaGraphs(tiny.llama(), capture)
    ids = tiny.tokens(2, 4)
    first = graphs.prefill(ids, torch.ones_like(ids))
    second = graphs.step(first.argmax(-1))
    before = second.clone()
    graphs.step(second.argmax(-1))
    assert torch.equal(second, before)


def test_weights_that_moved_are_captured_again(capture):
    model = tiny.llama()
    reasons = []
    graphs = CudaGraphs(model, capture, lambda model: "".join(reasons))
    ids = tiny.tokens(1, 4)
    greedy(graphs, ids)
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)  # in place: a graph sees it
    assert torch.equal(greedy(graphs, ids), by_transformers(model, ids))
    assert capture.count == 1
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.flip(0))
    assert torch.equal(greedy(graphs, ids), by_transformers(model, ids))
    assert capture.count == 2 and graphs.name == "cuda graph"
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.flip(0))
    reasons.append("it has moved")
    assert torch.equal(greedy(graphs, ids), by_transformers(model, ids))
    assert capture.count == 2 and graphs.name == "transformers"


def test_a_decoder_takes_graphs_where_there_are_any(capture, monkeypatch):
    model, ids = tiny.llama(), tiny.tokens(2, 5)
    assert Decoder(model).runtime == "transformers"
    expected = torch.stack([*Decoder(model, 2).stream(ids, max_new_tokens=NEW)], 1)
    on_gpu = torch.device("cuda", 0)
    with monkeypatch.context() as patch:
        patch.setattr(decoder, "input_device", lambda model: on_gpu)
        refused = Decoder(model)
        assert refused.runtime == "transformers"
        assert refused.reason == "a CUDA graph needs the model on one GPU, got cpu"
        patch.setattr(cuda_graph, "why_not", lambda model: "")
        by_graphs = Decoder(model, 2)
    by_graphs._runtime.capture = capture
    assert by_graphs.runtime == "cuda graph" and by_graphs.reason == ""
    assert torch.equal(torch.stack([*by_graphs.stream(ids, max_new_tokens=NEW)], 1), expected)
    assert capture.count == 1


def test_inference_mode_around_some_calls_only(capture):
    graphs, ids = CudaGraphs(tiny.llama(), capture), tiny.tokens(1, 4)
    with torch.inference_mode():
        expected = greedy(graphs, ids)
    assert torch.equal(greedy(graphs, ids), expected)


@pytest.mark.parametrize("name", ZOO)
def test_architectures_are_captured_or_refused_with_a_reason(name, capture):
    model = zoo_model(name)
    reason = why_no_static_step(model)
    if name in CAPTURED:
        assert reason == ""
        ids = tiny.tokens(2, 5)
        assert torch.equal(greedy(CudaGraphs(model, capture), ids), by_transformers(model, ids))
    elif reason:
        assert re.search("forward takes no|a graph can't follow|needs attention 'sdpa'", reason)


def test_a_model_that_asks_for_sdpa_by_name_keeps_it(capture):
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = tiny.causal_lm(FalconConfig(**sizes, alibi=False), torch.float32)
    assert why_no_static_step(model) == ""
    ids = tiny.tokens(2, 5)
    assert torch.equal(greedy(CudaGraphs(model, capture), ids), by_transformers(model, ids))


def test_reasons():
    model = tiny.llama()
    assert why_no_static_step(model) == ""
    assert cuda_graph.why_not(model) == "a CUDA graph needs the model on one GPU, got cpu"
    model.set_attn_implementation("eager")
    assert why_no_static_step(model) == "a graph needs attention 'sdpa', the model has 'eager'"
    model = tiny.llama()
    attend = type(model.model.layers[0].self_attn).forward

    def without_mask(self, *given, attention_mask=None, **named):
        return attend(self, *given, attention_mask=None, **named)

    for block in model.model.layers:
        block.self_attn.forward = without_mask.__get__(block.self_attn)
    assert "over a static cache its logits differ by" in why_no_static_step(model)


@pytest.mark.parametrize(("tokens", "length"), [(1, 256), (256, 256), (257, 512), (4097, 8192)])
def test_lengths(tokens, length):
    assert cuda_graph.length_for(tokens) == length
