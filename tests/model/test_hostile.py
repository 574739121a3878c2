"""Folders that a stranger or an accident has altered: an error that names the file, at once, and
nothing of the folder is run or waited for."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from helpers import hostile
from helpers.checkpoints import LAYER, build
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from hylora_kernels.model import files, format
from hylora_kernels.model.checkpoint import layer_shapes, load_pretrained
from hylora_kernels.model.files import CheckpointError
from hylora_kernels.model.load import load_model, tokenizer_of
from hylora_kernels.model.saving import save_pretrained

JSON_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """kind -> folder: the same model dense and compressed, with a tokenizer."""
    words = Tokenizer(models.WordLevel({"?": 0, "a": 1}, unk_token="?"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", eos_token="a")
    tokenizer.chat_template = "{{ messages }}"
    found = {kind: tmp_path_factory.mktemp(kind) for kind in ("compressed", "dense")}
    save_pretrained(build(), found["compressed"], tokenizer)
    build(rank=0).save_pretrained(found["dense"])
    tokenizer.save_pretrained(found["dense"])
    return found


@pytest.fixture
def copy_of(folders, tmp_path):
    """A function from a kind to a fresh copy of its folder."""

    def copy(kind: str) -> Path:
        folder = tmp_path / kind
        shutil.rmtree(folder, ignore_errors=True)
        return Path(shutil.copytree(folders[kind], folder))

    return copy


def refused(folder: Path, load=lambda folder: load_model(folder, "cpu")) -> str:
    """The error of loading the folder, which must be ours and come within a second of CPU time."""
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(120)  # something waits
    start = time.process_time()
    try:
        with pytest.raises(CheckpointError) as caught:
            load(folder)
    finally:
        signal.alarm(0)
    assert time.process_time() - start < 1
    return str(caught.value).replace(f"name_or_path '{folder}'", "")


def check_all(changes, name: str, copy, load=lambda folder: load_model(folder, "cpu")) -> None:
    """Every change is refused with an error that names the file `name`; all that fail are shown."""
    wrong = {}
    for what, change in changes:
        folder = copy()
        change(folder)
        try:
            message = refused(folder, load)
            if str(folder / name) not in message:
                wrong[what] = message
        except (AssertionError, Exception, pytest.fail.Exception) as error:
            wrong[what] = repr(error)
    assert not wrong


# ------------------------------------------------------------------------------------- whole files


@pytest.mark.parametrize("kind", ["compressed", "dense"])
@pytest.mark.parametrize("name", JSON_FILES)
def test_other_contents_of_a_file(name, kind, copy_of):
    check_all(hostile.rewritten(name), name, lambda: copy_of(kind))


@pytest.mark.parametrize("kind", ["compressed", "dense"])
@pytest.mark.parametrize("name", [*JSON_FILES, "model.safetensors", "chat_template.jinja"])
def test_something_else_in_the_place_of_a_file(name, kind, copy_of):
    check_all(hostile.replaced(name), name, lambda: copy_of(kind))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
@pytest.mark.parametrize("name", [*JSON_FILES, "model.safetensors"])
def test_a_file_without_permission_to_read(name, copy_of):
    folder = copy_of("compressed")
    (folder / name).chmod(0)
    assert str(folder / name) in refused(folder)


# ------------------------------------------------------------------------------------ single fields

MODULE = ("quantization_config", "modules", LAYER)


def test_fields_of_our_entry(copy_of):
    paths = [("quantization_config",), ("quantization_config", "checksums")]
    paths += [MODULE[:2], MODULE]
    paths += [("quantization_config", name) for name in ("format", "quant_method")]
    paths += [(*MODULE, name) for name in ("rank", "lora_rank", "alpha", "form", "group")]
    changes = [
        (what, change)
        for path in paths
        for what, change in hostile.with_fields("config.json", path)
        if not (path[-1] == "alpha" and what.endswith((" -1", " 0", "0000", " 1.5")))
        and not (path[-1] == "group" and what.endswith(" None"))
        and not (path[-1] == "checksums" and what.endswith(" {}"))
        # Fields that describe another model are noticed in its weights.
        and not (path == MODULE[:2] and what.endswith(" {}"))
        and not (path[-1] == "lora_rank" and what.endswith((" 0", "000000")))
    ]
    assert len(changes) > 150
    check_all(changes, "config.json", lambda: copy_of("compressed"), load_pretrained)


# Changes of the config that leave the same model: the tensors fit, and no output is another but
# where the epsilon is.
SAME_MODEL = {
    *("architectures = None", "dtype = None", "rms_norm_eps = 1.5", "rms_norm_eps = inf"),
}


@pytest.mark.parametrize("kind", ["compressed", "dense"])
def test_fields_of_the_config(kind, copy_of):
    fields = ("hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers")
    fields += ("vocab_size", "intermediate_size", "hidden_act", "rms_norm_eps", "dtype")
    fields += ("architectures",) if kind == "compressed" else ("model_type",)
    for field in fields:
        for what, change in hostile.with_fields("config.json", (field,)):
            folder = copy_of(kind)
            change(folder)
            try:
                load_model(folder, "cpu")
            except CheckpointError as error:
                assert str(folder) in str(error).replace(f"name_or_path '{folder}'", ""), what
            else:  # the value is the class's default, or has no part in what it computes
                assert what in SAME_MODEL, what


@pytest.mark.parametrize(
    ("name", "field", "kinds"),
    [
        ("generation_config.json", "eos_token_id", "a token id or a list of them"),
        ("generation_config.json", "use_cache", "true or false"),
        ("generation_config.json", "temperature", "a finite number"),
        ("tokenizer_config.json", "model_max_length", "a number"),
        ("tokenizer_config.json", "chat_template", "a template or named templates"),
        ("tokenizer_config.json", "fast_tokenizer_files", "names of files in this folder"),
    ],
)
def test_a_field_of_another_kind_is_named(name, field, kinds, copy_of):
    folder = copy_of("compressed")
    hostile.edited(name, lambda whole: whole.update({field: ["../tokenizer.json", 1.5]}))(folder)
    message = refused(folder)
    assert f"{folder / name}: '{field}' must be {kinds}, got ['../tokenizer.json', 1.5]" in message


def test_a_zero_in_the_config_is_named(copy_of):
    """The library's own error is "integer modulo by zero"."""
    for kind in ("compressed", "dense"):
        folder = copy_of(kind)
        zero = {"num_attention_heads": 0, "head_dim": None}
        hostile.edited("config.json", lambda whole, zero=zero: whole.update(zero))(folder)
        assert "num_attention_heads is 0" in refused(folder)


def test_names_that_stand_twice(copy_of):
    folder = copy_of("compressed")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"hidden_size"', '"vocab_size"'))
    assert f"{folder / 'config.json'}: corrupted: 'vocab_size' stands twice" in refused(folder)
    text = b'{"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, "a": {}}'
    hostile.header_edited(lambda header: text)(folder := copy_of("compressed"))
    assert "model.safetensors: corrupted header: 'a' stands twice" in refused(folder)


@pytest.mark.parametrize("theta", [0, -1, float("inf")])
def test_tables_of_nan_or_infinity_are_no_model(theta, copy_of):
    """rope_theta 0 makes infinite frequencies, and every output NaN."""
    folder = copy_of("compressed")

    def edit(whole):
        whole["rope_parameters"]["rope_theta"] = theta

    hostile.edited("config.json", edit)(folder)
    try:
        model, _ = load_model(folder, "cpu")
    except CheckpointError as error:
        assert "config.json" in str(error)
    else:
        with torch.no_grad():
            assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


# ------------------------------------------------------------------------------------------ weights

HEADERS = {
    "no object": lambda h: b"[]",
    "no JSON": lambda h: b"{",
    "deep": lambda h: b"[" * 100_000,
    "unknown dtype": lambda h: h["lm_head.weight"].update(dtype="F7"),
    "dtype of another kind": lambda h: h["lm_head.weight"].update(dtype=[1]),
    "a negative size": lambda h: h["lm_head.weight"].update(shape=[-64, -32]),
    "a bool": lambda h: h["lm_head.weight"].update(shape=[True, 2048]),
    "a float": lambda h: h["lm_head.weight"].update(shape=[64.0, 32]),
    "NaN": lambda h: h["lm_head.weight"].update(shape=[float("nan"), 32]),
    "a huge shape": lambda h: h["lm_head.weight"].update(shape=[2**62, 2**62]),
    "many dimensions": lambda h: h["lm_head.weight"].update(shape=[2**62] * 100_000),
    "beyond the file": lambda h: h["lm_head.weight"].update(data_offsets=[0, 2**62]),
    "backwards": lambda h: h["lm_head.weight"].update(data_offsets=[8192, 0]),
    "overlapping": lambda h: h["lm_head.weight"].update(data_offsets=[4, 8196]),
    "a hole": lambda h: h.pop("lm_head.weight"),
    "an entry of another kind": lambda h: h.update({"lm_head.weight": 5}),
    "a field more": lambda h: h["lm_head.weight"].update(more=1),
    "a name that is not in the model": lambda h: h.update({"../\x1b[31m": h.pop("lm_head.weight")}),
}


@pytest.mark.parametrize("kind", ["compressed", "dense"])
def test_headers(kind, copy_of):
    changes = [(what, hostile.header_edited(edit)) for what, edit in HEADERS.items()]
    name = "model.safetensors" if kind == "compressed" else ""  # transformers says what is missing
    check_all(changes, name, lambda: copy_of(kind))


def test_a_header_beyond_the_limit_is_not_read(copy_of):
    """8 GB of header in a sparse file; the limit stands in the error."""
    for kind in ("compressed", "dense"):
        path = copy_of(kind) / "model.safetensors"
        with path.open("r+b") as file:
            file.write((8 * 10**9).to_bytes(8, "little"))
            file.truncate(9 * 10**9)
        message = refused(path.parent)
        assert f"{path}: its header has 8000000000 bytes" in message
        assert f"more than the limit of {files.MAX_JSON}" in message


@pytest.mark.parametrize("kind", ["compressed", "dense"])
@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "", ".", "..", 3, "a\0b"])
def test_an_index_names_files_of_its_folder_only(kind, name, copy_of):
    folder = copy_of(kind)
    shutil.move(folder / "model.safetensors", folder.parent / "model.safetensors")
    (folder / format.INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    if kind == "compressed":
        hostile.edited("config.json", lambda c: c["quantization_config"].pop("checksums"))(folder)
    message = refused(folder)
    assert f"{folder / format.INDEX}: a file in weight_map must name a file in this fold" in message
    if kind == "compressed" and isinstance(name, str):
        sums = {"checksums": {name: {}}}
        hostile.edited("config.json", lambda c: c["quantization_config"].update(sums))(folder)
        assert "config.json: a name in checksums must name a file" in refused(folder)


@pytest.mark.parametrize("listed", [None, [], {}, "x", {"lm_head.weight": "nowhere.safetensors"}])
def test_an_index_that_lists_nothing_or_missing_shards(listed, copy_of):
    folder = copy_of("dense")
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    (folder / format.INDEX).write_text(json.dumps({"weight_map": listed}))
    assert str(folder) in refused(folder)


def test_an_index_that_puts_a_tensor_in_another_shard(copy_of):
    folder = copy_of("dense")
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    (folder / format.INDEX).write_text(json.dumps({"weight_map": {"x": "part.safetensors"}}))
    assert f"{folder / 'part.safetensors'}: tensor 'x' is missing" in refused(folder)


# -------------------------------------------------------------------------------------------- bombs


@pytest.mark.parametrize("kind", ["compressed", "dense"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 4_000}, "'num_hidden_layers' is 4000, more than the limit of 1000"),
        ({"num_hidden_layers": 10**9}, "'num_hidden_layers' is 1000000000, more than the limit"),
        ({"num_hidden_layers": 1_000}, "describes a model of more than "),
        ({"x": [{"num_experts": 10**9}]}, "'num_experts' is 1000000000, more than the limit of 65"),
        ({"num_labels": 10**9}, "'num_labels' is 1000000000, more than the limit of 65536"),
        ({"vocab_size": 10**9}, ""),
        ({"hidden_size": 2**20}, ""),
        ({"rms_norm_eps": float("nan")}, "config.json: 'rms_norm_eps' is NaN"),
    ],
)
def test_a_small_config_of_a_large_model(kind, change, message, copy_of):
    """Before the headers were asked, 4,000 layers took 46 s, and a config of 1 KB 13 GB."""
    folder = copy_of(kind)
    hostile.edited("config.json", lambda whole: whole.update(change))(folder)
    assert message in refused(folder)


def test_tables_that_a_model_makes_have_a_limit(copy_of, monkeypatch):
    monkeypatch.setattr("hylora_kernels.model.skeleton.MAX_BUFFERS", 8)
    assert "the model makes buffers of" in refused(copy_of("compressed"))


def test_json_has_a_limit(copy_of, monkeypatch):
    monkeypatch.setattr(files, "MAX_JSON", 100)
    message = refused(copy_of("dense"))
    assert "config.json: has " in message and "more than the limit of 100" in message


# ------------------------------------------------------------------------------- links and the hub


def test_links_out_of_the_folder_are_followed(copy_of, tmp_path):
    """The hub's cache is made of them: snapshots/<commit>/<name> -> ../../blobs/<hash>."""
    for kind in ("compressed", "dense"):
        folder, blobs = copy_of(kind), tmp_path / f"{kind}-blobs"
        blobs.mkdir()
        for file in folder.iterdir():
            file.rename(blobs / file.name)
            file.symlink_to(Path("..") / blobs.name / file.name)
        _, tokenizer = load_model(folder, "cpu")
        assert tokenizer("a")["input_ids"] == [1]


def test_a_model_of_the_hub_is_a_folder_of_its_cache(copy_of, tmp_path, monkeypatch):
    """The same checks, no Python and no pickles; its name stays the hub's."""
    asked = []

    def fetch(name, allow_patterns, ignore_patterns, revision):
        assert revision is None
        asked.append((name, set(allow_patterns), ignore_patterns))
        return str(folder)

    monkeypatch.setattr("hylora_kernels.model.load.snapshot_download", fetch)
    for kind in ("compressed", "dense"):
        folder = copy_of(kind)
        model, tokenizer = load_model("some/model", "cpu")
        assert model.name_or_path == "some/model" and tokenizer("a")["input_ids"] == [1]
    name, patterns, ignored = asked[-1]
    assert name == "some/model" and ignored == "*/*" and "*.py" not in patterns
    assert "model.safetensors" in patterns and not any("bin" in p for p in patterns)
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    with pytest.raises(CheckpointError, match=r"'some/model' could not be loaded: .*no file n"):
        (folder / "pytorch_model.bin").touch()
        load_model("some/model", "cpu")
    with pytest.raises(CheckpointError):
        load_model("some/model", "cpu", trust_remote_code=True)
    assert "*.py" in asked[-1][1]


# -------------------------------------------------------------------------------- a stranger's code

CODE = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
Path({ran!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = "of-its-own"
class Model(LlamaForCausalLM):
    config_class = Config
class Words(PreTrainedTokenizerFast):
    pass
def generate(model, *args, **kwargs):
    pass
"""
AUTO = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model", "AutoModel": "own.Model"}


@pytest.fixture
def with_code(copy_of, tmp_path, monkeypatch):
    """A function from a kind to a folder with code of every kind; and the file that it makes."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question in the middle"))
    ran = tmp_path / "ran"

    def make(kind: str, **config) -> Path:
        folder = copy_of(kind)
        code = CODE.format(ran=str(ran))
        (folder / "custom_generate").mkdir()
        for name in ("own.py", "custom_generate/generate.py", "__init__.py", "setup.py"):
            (folder / name).write_text(code)
        hostile.edited("config.json", lambda c: c.update(auto_map=AUTO, **config))(folder)
        words = {"auto_map": {"AutoTokenizer": ["own.Words", "own.Words"]}}
        hostile.edited("tokenizer_config.json", lambda c: c.update(words))(folder)
        own = {"auto_map": AUTO, "custom_generate": "own.generate"}
        hostile.edited("generation_config.json", lambda c: c.update(own))(folder)
        return folder

    return make, ran


@pytest.mark.parametrize("kind", ["compressed", "dense"])
def test_code_of_a_folder_is_not_run_and_nothing_asks(kind, with_code):
    """Where transformers has the classes, they are taken; it asked y/N where it has none."""
    make, ran = with_code
    model, _ = load_model(make(kind), "cpu")
    assert type(model).__module__.startswith("transformers.models.")
    model.generate(torch.tensor([[1]]), max_new_tokens=1)
    tokenizer_of(model)
    assert not ran.exists()


def test_a_model_of_its_own_code_is_refused(with_code):
    make, ran = with_code
    message = refused(folder := make("dense", model_type="of-its-own"))
    assert f"{folder / 'config.json'}: model_type 'of-its-own' is defined by code" in message
    assert "it is run only with trust_remote_code=True" in message
    assert not ran.exists()


def test_a_trusted_folders_code_runs(with_code):
    make, ran = with_code
    folder = make("dense", model_type="of-its-own")
    model, _ = load_model(folder, "cpu", trust_remote_code=True)
    assert type(model).__name__ == "Model" and ran.exists()
    with pytest.raises(CheckpointError, match="transformers knows no model class 'Model'"):
        save_pretrained(model, folder / "out")


@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation"])
def test_a_kernel_that_the_config_names_on_the_hub_is_refused(field, copy_of):
    for kind in ("compressed", "dense"):
        folder = copy_of(kind)
        kernel = {field: "some-org/some-kernel"}
        hostile.edited("config.json", lambda c, kernel=kernel: c.update(kernel))(folder)
        message = refused(folder)
        assert f"config.json: {field} names code on the hub, 'some-org/some-kernel'" in message


def test_adapters_of_another_library_are_refused(copy_of):
    folder = copy_of("dense")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "some/model"}')
    assert f"{folder / 'adapter_config.json'}: adapters of PEFT are not loaded" in refused(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_pickles_are_never_read(name, copy_of):
    for kind in ("compressed", "dense"):
        folder = copy_of(kind)
        (folder / "model.safetensors").rename(folder / name)
        assert f"{folder / name}: pickles are not read" in refused(folder)


def test_files_to_remove_are_those_of_the_folder(copy_of, tmp_path):
    """The next save removes what the folder's config.json lists as its own."""
    folder = copy_of("compressed")
    (folder / "elsewhere").symlink_to(tmp_path)
    names = ["config.json", "../x", str(tmp_path / "x"), "elsewhere/x"]
    hostile.edited("config.json", lambda c: c["quantization_config"].update(files=names))(folder)
    assert format.own_files(folder) == {"config.json"}


def test_layer_shapes_of_a_hostile_folder(copy_of):
    folder = copy_of("compressed")
    hostile.header_edited(lambda h: h[f"{LAYER}.SVh"].update(shape=[256]))(folder)
    assert str(folder) in refused(folder, layer_shapes)
