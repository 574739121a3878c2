"""A .gguf file is loaded whole or not at all."""

from __future__ import annotations

import numpy as np
import pytest

from hylora_kernels.model.files import CheckpointError
from hylora_kernels.model.load import load_model

gguf = pytest.importorskip("gguf")

UP = "blk.0.ffn_up.weight"
SHAPES = {
    **dict.fromkeys(["token_embd.weight", "output.weight"], (8, 32)),
    **dict.fromkeys(["output_norm.weight", "blk.0.attn_norm.weight", "blk.0.ffn_norm.weight"], 32),
    **dict.fromkeys(["blk.0.attn_q.weight", "blk.0.attn_output.weight"], (32, 32)),
    **dict.fromkeys(["blk.0.attn_k.weight", "blk.0.attn_v.weight"], (16, 32)),
    **dict.fromkeys(["blk.0.ffn_gate.weight", UP], (48, 32)),
    "blk.0.ffn_down.weight": (32, 48),
}


def write(path, layers=1, hidden=32, **changes):
    """A Llama of one layer; changes: tensor -> another shape, or None for none."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["t", "0", "t0", "a", "b", "c", "d", "e"])
    writer.add_token_merges(["t 0"])
    for name, shape in (SHAPES | changes).items():
        if shape is not None:
            writer.add_tensor(name, np.ones(shape, "float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("changes", [{}, {"output.weight": None}])
def test_a_whole_file(changes, tmp_path):
    write(tmp_path / "m.gguf", **changes)
    model, tokenizer = load_model(tmp_path / "m.gguf", "cpu")
    assert len(model.model.layers) == 1 and tokenizer.convert_tokens_to_ids("t0") == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({UP: None}, r"tensor model\.layers\.0\.mlp\.up_proj\.weight is missing from the weights"),
        ({UP: (47, 32)}, r".*up_proj\.weight \(it has \[47, 32\], the model \[48, 32\]\)"),
        ({"layers": 2}, r"tensors model\.layers\.1\..* are missing from the weights"),
        ({"layers": 900}, r"describes a model of more than 256 parameters, but .* 12 tensors"),
        ({"layers": 4_000}, r"'num_hidden_layers' is 4000, more than the limit of 1000"),
        ({"hidden": 2**20}, r"describes a model of [\d,]+ numbers, but the weights hold"),
    ],
)
def test_what_the_file_lacks_is_named(changes, message, tmp_path):
    write(tmp_path / "m.gguf", **changes)
    with pytest.raises(CheckpointError, match=rf"m\.gguf: {message}"):
        load_model(tmp_path / "m.gguf", "cpu")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\3\0\0\0" + b"\xff" * 16, b"x" * 100])
def test_a_file_that_is_cut_or_no_model(content, tmp_path):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"m\.gguf: no model comes of it"):
        load_model(tmp_path / "m.gguf", "cpu")
