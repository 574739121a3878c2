"""Every fault of a checkpoint is an error that names the file and the tensor."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.checkpoints import (
    LAYER,
    build,
    edit_config,
    edit_weights,
)
from safetensors.torch import load_file, save_file

from hylora_kernels.model.checkpoint import CheckpointError, load_pretrained
from hylora_kernels.model.saving import save_pretrained

# ------------------------------------------------------------------------------- broken checkpoints


def test_not_a_checkpoint(tmp_path, copied):
    with pytest.raises(CheckpointError, match=r"nowhere/config\.json: not found"):
        load_pretrained(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is a file; .* reads a folder"):
        load_pretrained(copied / "model.safetensors")
    (tmp_path / "m.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"m\.pt: is a pickle; load_pretrained reads"):
        load_pretrained(tmp_path / "m.pt")
    build(rank=0).save_pretrained(tmp_path / "plain")
    with pytest.raises(CheckpointError, match=r"config\.json: quant_method is None, not 'hylora'"):
        load_pretrained(tmp_path / "plain")


def test_pickled_weights_are_refused(copied):
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: pickles are not read"):
        load_pretrained(copied)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format=3), r"config\.json: format is 3, supported are 1 and 2"),
        (lambda c: c.pop("format"), r"config\.json: format is None, supported are 1 and 2"),
        (lambda c: c.update(quant_method="gptq"), r"config\.json: quant_method is 'gptq', not 'hy"),
        (lambda c: c.update(modules=[1]), r"modules must be an object of objects, got \[1\]"),
        (lambda c: c.update(checksums={"a": 1}), "checksums must be an object of objects"),
        (
            lambda c: c["modules"][LAYER].update(rank=99),
            rf"config\.json: modules\['{LAYER}'\]: rank must be in 1\.\.32.*got 99",
        ),
        (lambda c: c["modules"][LAYER].update(rank="8"), r"up_proj'\]: rank must be an int"),
        (lambda c: c["modules"][LAYER].update(form="lu"), r"up_proj'\]: form must be one of"),
        (lambda c: c["modules"][LAYER].update(group="g"), r"up_proj'\]: group must be null"),
        (lambda c: c["modules"][LAYER].update(extra=1), r"up_proj'\]: .*'extra'"),
        (lambda c: c["modules"][LAYER].pop("alpha"), r"up_proj'\]: .*'alpha'"),
        (
            lambda c: c["modules"].update({"model.nothing": c["modules"][LAYER]}),
            r"modules\['model\.nothing'\]: .*nothing",
        ),
        (
            lambda c: c["modules"].update({"model.norm": c["modules"][LAYER]}),
            r"modules\['model\.norm'\]: LlamaRMSNorm is no linear layer",
        ),
        (
            lambda c: c["modules"][LAYER].update(rank=7),
            rf"model\.safetensors: tensor '{LAYER}\.\w+' must have shape \[\d+(, \d+)?\], has",
        ),
        (
            lambda c: c["modules"][LAYER].update(form="pair"),
            rf"tensor '{LAYER}\.U' must have shape \[48, 8\], has \[40, 8\]",
        ),
        (
            lambda c: c["modules"].pop(LAYER),
            rf"model\.safetensors: unexpected tensor '{LAYER}\.\w+': the model has none",
        ),
        (
            lambda c: c["checksums"].update({"model-2.safetensors": {}}),
            r"model-2\.safetensors: can't be read: No such file",
        ),
        (
            lambda c: c["checksums"]["model.safetensors"].update({f"{LAYER}.U": "00000000"}),
            rf"model\.safetensors: corrupted: tensor '{LAYER}\.U' doesn't have its checksum",
        ),
    ],
)
def test_altered_config(copied, change, message):
    edit_config(copied, change)
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(copied)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"config\.json: corrupted: Expecting property name"),
        ("[]", r"config\.json: corrupted: list instead of an object"),
        ("\x00\x01", r"config\.json: corrupted"),
    ],
)
def test_config_that_is_no_json(copied, content, message):
    (copied / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(copied)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["NoSuchModel"], "model_type": "x"}, "no model class 'NoSuchModel'"),
        ({"architectures": ["AutoConfig"]}, "no model class 'AutoConfig'"),
        ({"hidden_size": "wide"}, "no LlamaForCausalLM comes of it"),
        ({"hidden_size": 64}, r"must have shape \[.*\], has"),
    ],
)
def test_config_that_describes_another_model(copied, change, message):
    config = json.loads((copied / "config.json").read_text()) | change
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"(?s)(config.json|model.safetensors): .*{message}"):
        load_pretrained(copied)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{LAYER}.U"), rf"tensor '{LAYER}\.U' is missing \(1 in all\)"),
        (lambda t: t.update(more=torch.ones(2)), "unexpected tensor 'more': the model has none"),
        (
            lambda t: t.update({f"{LAYER}.SVh": torch.ones(8, 31)}),
            rf"tensor '{LAYER}\.SVh' must have shape \[8, 32\], has \[8, 31\]",
        ),
        (
            lambda t: t.update({f"{LAYER}.pivots": t[f"{LAYER}.pivots"].long()}),
            rf"tensor '{LAYER}\.pivots' must have torch\.int32, has torch\.int64",
        ),
        (
            lambda t: t.update({f"{LAYER}.pivots": t[f"{LAYER}.pivots"].flip(0).contiguous()}),
            rf"tensor '{LAYER}\.pivots' must be strictly ascending within \[0, 48\)",
        ),
        (
            lambda t: t[f"{LAYER}.pivots"].__setitem__(-1, 48),
            rf"tensor '{LAYER}\.pivots' must be strictly ascending within \[0, 48\)",
        ),
        (
            lambda t: t[f"{LAYER}.pivots"].__setitem__(0, -1),
            rf"tensor '{LAYER}\.pivots' must be strictly ascending within \[0, 48\)",
        ),
        (
            lambda t: t.update({f"{LAYER}.A": t[f"{LAYER}.A"].int()}),
            rf"tensor '{LAYER}\.A' must have a floating dtype, has torch\.int32",
        ),
    ],
)
def test_altered_weights(copied, change, message):
    edit_weights(copied, change)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: {message}"):
        load_pretrained(copied)


def test_one_tensor_in_two_shards(tmp_path):
    save_pretrained(build(), tmp_path, max_shard_size="20KB")
    first, second = sorted(tmp_path.glob("model-*.safetensors"))[:2]
    a, b = load_file(first), load_file(second)
    name = next(iter(a))
    save_file(b | {name: a[name]}, second)
    with pytest.raises(CheckpointError, match=rf"{second.name}: tensor '{name}' is also in"):
        load_pretrained(tmp_path)


def test_truncated_at_any_length(copied):
    path = copied / "model.safetensors"
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    layout = json.loads(whole[8:header])
    for length in (0, 4, 8, 100, header - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated: \d+ bytes"):
            load_pretrained(copied)
    for length in (header, header + 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        cut = min(
            (entry["data_offsets"], name)
            for name, entry in layout.items()
            if name != "__metadata__" and header + entry["data_offsets"][1] > length
        )[1]
        message = rf"model\.safetensors: truncated at byte {length}, in tensor '{cut}'"
        with pytest.raises(CheckpointError, match=message):
            load_pretrained(copied)
    path.write_bytes(whole + b"\0\0")
    with pytest.raises(CheckpointError, match="2 bytes after the last tensor"):
        load_pretrained(copied)


def test_any_flipped_byte_is_noticed(copied):
    path = copied / "model.safetensors"
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(start, len(whole), (6,), generator=generator).tolist()
    layout = json.loads(whole[8:start])
    for place in (start, len(whole) - 1, *places):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        hit = next(
            name
            for name, entry in layout.items()
            if name != "__metadata__"
            and entry["data_offsets"][0] <= place - start < entry["data_offsets"][1]
        )
        with pytest.raises(CheckpointError, match=f"corrupted: tensor '{hit}' doesn't have its"):
            load_pretrained(copied)
    load_pretrained(copied, verify=False)


def test_any_flipped_byte_of_the_header_is_noticed(copied):
    """Some are harmless, as in the spaces that pad it; the model is the same then."""
    path = copied / "model.safetensors"
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    state = load_pretrained(copied).state_dict()
    refused = 0
    for place in range(1, 200, 9):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        try:
            found = load_pretrained(copied).state_dict()
        except CheckpointError as error:
            assert "model.safetensors" in str(error)
            refused += 1
        else:
            assert all(torch.equal(found[name], state[name]) for name in state), place
    assert start > 200
    assert refused > 16


def test_header_that_lies(copied):
    path = copied / "model.safetensors"
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    data = whole[start:]

    def rewrite(change):
        header = json.loads(whole[8:start])
        change(header)
        encoded = json.dumps(header).encode()
        path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)

    name = f"{LAYER}.SVh"
    cases = [
        (lambda h: h[name].update(dtype="F8"), "corrupted header: 'F8'"),
        (lambda h: h[name].update(shape=[8, -32]), r"corrupted header: shape \[8, -32\]"),
        (lambda h: h[name].update(shape=[8, 33]), f"corrupted header: tensor '{name}' takes 1056"),
        (lambda h: h[name].pop("shape"), "corrupted header: .*'shape'"),
        (lambda h: h[name].update(data_offsets=[0]), "corrupted header: not enough values"),
        (lambda h: h[name].update(data_offsets=[0, 1024]), "corrupted header: tensor"),
        (lambda h: h.update({name: 5}), "corrupted header"),
    ]
    for change, message in cases:
        rewrite(change)
        with pytest.raises(CheckpointError, match=rf"model\.safetensors: {message}"):
            load_pretrained(copied)
