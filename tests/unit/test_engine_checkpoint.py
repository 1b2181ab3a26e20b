"""Model folders that are missing, broken, too big or hostile: each is refused before anything of it is loaded."""

from __future__ import annotations

import json
import os
import pickle
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import TEMPLATE, write_tiny_model

from agentops.engine.checkpoint import Quantization, open_checkpoint
from agentops.engine.local import open_engine
from agentops.engine.tokenizer import ChatTokenizer
from agentops.errors import ModelBroken, ModelNotFound, ModelUnsafe, ModelUnsupported, UsageError
from agentops.model_lock import write_lock
from agentops.records import Message
from agentops.settings import load_settings


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "tiny", bits=4)


def edit(folder: Path, name: str = "config.json", **changes: Any) -> None:
    tree = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**tree, **changes}))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def with_header(folder: Path, header: bytes | dict[str, Any], data: bytes = b"") -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + data)


class Canary:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.path}'",)


def test_a_sound_folder_is_described(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config.layers == 2
    assert checkpoint.config.eos == (2,)
    assert checkpoint.quantization == Quantization(4, 32, False, True)
    assert checkpoint.tensor("model.norm.weight").shape == (64,)
    assert checkpoint.tensor("model.layers.1.mlp.down_proj.qweight").dtype == torch.int32
    assert checkpoint.weight_bytes < (folder / "model.safetensors").stat().st_size


def test_shards_and_the_names_other_tools_give_are_read(tmp_path: Path) -> None:
    whole = open_checkpoint(write_tiny_model(tmp_path / "whole"))
    shards = open_checkpoint(write_tiny_model(tmp_path / "shards", shards=3))
    assert set(whole.names) == set(shards.names)
    assert torch.equal(whole.tensor("lm_head.weight"), shards.tensor("lm_head.weight"))
    other = write_tiny_model(tmp_path / "other", bits=4)
    (other / "model.safetensors").rename(other / "gptq_model-4bit-32g.safetensors")
    settings = json.loads((other / "config.json").read_text())
    (other / "quantize_config.json").write_text(json.dumps(settings.pop("quantization_config")))
    (other / "config.json").write_text(json.dumps(settings))
    assert open_checkpoint(other).quantization == Quantization(4, 32, False, True)


def test_the_revision_names_the_content(folder: Path, tmp_path: Path) -> None:
    same = write_tiny_model(tmp_path / "same", bits=4)
    first = open_checkpoint(folder).revision
    assert first.startswith("b2:")
    assert open_checkpoint(same).revision == first
    rewrite(same, lambda tensors: tensors["model.norm.weight"].mul_(1.01))
    assert open_checkpoint(same).revision != first


def test_a_missing_folder_points_to_the_models_there_are(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="there is no model folder") as caught:
        open_checkpoint(tmp_path / "nowhere")
    assert "agentops models list" in caught.value.hint


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ModelBroken, match=name.replace("model.safetensors", "no weights")):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "weights.pkl", "last.CKPT"])
@pytest.mark.parametrize("beside", [True, False], ids=["beside safetensors", "alone"])
def test_a_pickle_is_refused_and_does_not_run(folder: Path, tmp_path: Path, name: str, beside: bool) -> None:
    canary = tmp_path / "executed"
    (folder / name).write_bytes(pickle.dumps(Canary(canary)))
    if not beside:
        (folder / "model.safetensors").unlink()
    with pytest.raises(ModelUnsafe, match="nothing was loaded") as caught:
        open_checkpoint(folder)
    assert name in str(caught.value)
    assert caught.value.hint
    assert not canary.exists()


@pytest.mark.parametrize("content", [b"PK\x03\x04" + b"0" * 100, pickle.dumps({"a": 1}, protocol=4)], ids=["zip", "pickle"])
def test_a_pickle_named_safetensors_is_refused(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelUnsafe, match="pickle under another name"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("config.json", {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}),
        ("config.json", {"auto_map": {"AutoConfig": "hub/repo--evil.Config"}}),
        ("config.json", {"trust_remote_code": True}),
        ("config.json", {"text_config": {"deep": [{"auto_map": {"a": "b.c"}}]}}),
        ("config.json", {"_attn_implementation": "evil/kernel"}),
        ("config.json", {"_attn_implementation_internal": "evil/kernel"}),
        ("config.json", {"_experts_implementation": "evil/kernel"}),
        ("config.json", {"custom_pipelines": {"x": {"impl": "evil.Pipeline"}}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}),
        ("generation_config.json", {"custom_generate": "evil/repo"}),
    ],
)
def test_keys_that_load_code_are_refused(folder: Path, name: str, changes: dict[str, Any]) -> None:
    if not (folder / name).exists():
        (folder / name).write_text("{}")
    edit(folder, name, **changes)
    with pytest.raises(ModelUnsafe, match="asks for code"):
        open_checkpoint(folder)


def test_names_of_kernels_that_are_no_repositories_are_harmless(folder: Path) -> None:
    edit(folder, _attn_implementation="sdpa", auto_map=None, trust_remote_code=False)
    open_checkpoint(folder)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "does not run GPT2LMHeadModel"),
        ({"architectures": None}, "does not run"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 5, "group_size": 32}}, "5 bits"),
        ({"quantization_config": {"bits": 4, "group_size": 32, "is_marlin_format": True}}, "marlin"),
        ({"quantization_config": {"bits": 4, "group_size": 32, "dynamic": {"a": {}}}}, "dynamic"),
    ],
)
def test_what_it_does_not_run_is_said_with_what_it_does(folder: Path, changes: dict[str, Any], told: str) -> None:
    edit(folder, **changes)
    with pytest.raises(ModelUnsupported, match=told) as caught:
        open_checkpoint(folder)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"hidden_size": -1}, "hidden_size"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "do not fit"),
        ({"rms_norm_eps": True}, "rms_norm_eps"),
        ({"vocab_size": 385}, "model.embed_tokens.weight"),
        ({"intermediate_size": 256}, "configuration asks for"),
        ({"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight' is missing"),
        ({"quantization_config": {"bits": 4, "group_size": 64}}, "qzeros"),
        ({"quantization_config": {"bits": 4, "group_size": 0}}, "group_size"),
        ({"quantization_config": None}, "no quantization_config says how"),
    ],
)
def test_a_configuration_that_contradicts_itself_or_the_weights_is_broken(
    folder: Path, changes: dict[str, Any], told: str
) -> None:
    edit(folder, **changes)
    with pytest.raises(ModelBroken, match=told):
        open_checkpoint(folder)


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"a": ' * 100_000, "\udcff"])
def test_a_configuration_that_is_no_json_object_is_broken(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ModelBroken, match=r"config\.json"):
        open_checkpoint(folder)


def test_a_file_cut_off_anywhere_is_told_by_its_headers(folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    for length in [0, 4, 8, 100, header - 1, header, header + 1, len(whole) // 2, len(whole) - 1]:
        file.write_bytes(whole[:length])
        with pytest.raises(ModelBroken) as caught:
            open_checkpoint(folder)
        if length >= header:
            assert "it ends inside tensor '" in str(caught.value)


@pytest.mark.parametrize(
    ("header", "told"),
    [
        (b"x" * 100, "no JSON"),
        (b"[1, 2]", "no JSON object"),
        (b"[" * 100_000, "no JSON"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "is said to take 4 bytes, not 8"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, "ends inside tensor 'a'"),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}, "malformed"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}, "malformed"),
        ({"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}, "malformed"),
        ({"a": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 1 << 82]}}, "ends inside"),
        ({"a": []}, "malformed"),
    ],
)
def test_a_lying_header_is_caught_before_the_library_sees_it(folder: Path, header: Any, told: str) -> None:
    with_header(folder, header)
    with pytest.raises(ModelBroken, match=told):
        open_checkpoint(folder)


F32x2 = {"dtype": "F32", "shape": [2]}


@pytest.mark.parametrize(
    ("header", "data", "told"),
    [
        ({"a": {**F32x2, "data_offsets": [0, 8]}, "b": {**F32x2, "data_offsets": [4, 12]}}, 12, "'b' is said to begin at byte 4"),
        ({"a": {**F32x2, "data_offsets": [0, 8]}, "b": {**F32x2, "data_offsets": [0, 8]}}, 8, "'b' is said to begin at byte 0"),
        ({"a": {**F32x2, "data_offsets": [4, 12]}}, 12, "'a' is said to begin at byte 4"),
        ({"a": {**F32x2, "data_offsets": [0, 8]}}, 9, "1 bytes follow"),
    ],
    ids=["overlap", "twice", "gap", "more"],
)
def test_tensors_that_overlap_or_leave_gaps_are_broken(folder: Path, header: dict[str, Any], data: int, told: str) -> None:
    with_header(folder, header, b"\0" * data)
    with pytest.raises(ModelBroken, match=told):
        open_checkpoint(folder)


def tensors_of(file: Path) -> dict[str, tuple[int, int]]:
    """Where in the file each tensor begins and ends."""
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    return {name: tuple(8 + length + at for at in entry["data_offsets"]) for name, entry in header.items() if name[0] != "_"}


def test_a_file_cut_off_at_and_in_every_tensor_loads_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*_: Any, **__: Any) -> Any:
        raise AssertionError("a tensor library saw the file")

    monkeypatch.setattr("safetensors.safe_open", loaded)
    file = folder / "model.safetensors"
    whole, places = file.read_bytes(), tensors_of(file)
    assert len(places) > 60
    for name, (begin, end) in places.items():
        for length in {begin, (begin + end) // 2, end - 1}:
            file.write_bytes(whole[:length])
            with pytest.raises(ModelBroken, match="it ends inside tensor"):
                open_engine(folder, load_settings({}, environment={}))
        assert end <= len(whole), name


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales", "g_idx"])
def test_a_tensor_of_a_type_that_cannot_be_is_broken(folder: Path, part: str) -> None:
    name = f"model.layers.0.mlp.up_proj.{part}"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name].to(torch.int16 if part == "scales" else torch.float32)

    rewrite(folder, change)
    with pytest.raises(ModelBroken, match=f"{name}' has the type"):
        open_checkpoint(folder)


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales", "g_idx", "weight"])
def test_every_shape_that_is_not_the_configurations_is_broken(folder: Path, part: str) -> None:
    names = [name for name in load_file(folder / "model.safetensors") if name.endswith(part)]
    assert names
    for name in names[:: max(1, len(names) // 4)]:
        before = (folder / "model.safetensors").read_bytes()

        def cut(tensors: dict[str, torch.Tensor], name: str = name) -> None:
            tensors[name] = tensors[name][:-1].clone()

        rewrite(folder, cut)
        with pytest.raises(ModelBroken, match=f"{name}' has shape"):
            open_checkpoint(folder)
        (folder / "model.safetensors").write_bytes(before)


@pytest.mark.parametrize("kernel", ["int4", "float32"])
@pytest.mark.parametrize(
    ("part", "value"), [("scales", float("nan")), ("scales", float("-inf")), ("g_idx", 4), ("g_idx", -1), ("g_idx", 2**31 - 1)]
)
def test_values_that_cannot_be_open_no_engine_and_leave_no_thread(folder: Path, part: str, value: float, kernel: str) -> None:
    name = f"model.layers.1.mlp.down_proj.{part}"
    rewrite(folder, lambda tensors: tensors[name].view(-1)[7:8].fill_(value))
    before = threading.active_count()
    with pytest.raises(ModelBroken, match="down_proj") as caught:
        open_engine(folder, load_settings({"engine.kernel": kernel}, environment={}))
    assert caught.value.hint
    assert threading.active_count() == before


def test_a_header_above_16_mib_is_not_even_read(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    with pytest.raises(ModelBroken, match="its header claims"):
        open_checkpoint(folder)


def test_an_index_cannot_point_outside_the_folder(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny", shards=2)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(ModelUnsafe, match="outside the folder"):
        open_checkpoint(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-00003-of-00003.safetensors"}}))
    with pytest.raises(ModelBroken, match="model-00003-of-00003"):
        open_checkpoint(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_no_numbers_are_broken(folder: Path, value: float) -> None:
    name = "model.layers.1.mlp.up_proj.scales"
    rewrite(folder, lambda tensors: tensors[name].view(-1)[5:6].fill_(value))
    checkpoint = open_checkpoint(folder)
    with pytest.raises(ModelBroken, match=name):
        checkpoint.tensor(name)


def test_groups_that_point_nowhere_are_broken(folder: Path) -> None:
    from agentops.engine.linear import make_linear

    name = "model.layers.0.mlp.down_proj"
    rewrite(folder, lambda tensors: tensors[f"{name}.g_idx"][3:4].fill_(77))
    checkpoint = open_checkpoint(folder)
    for kernel in ("int4", "float32"):
        with pytest.raises(ModelBroken):
            make_linear(checkpoint, [name], kernel, "cpu")


def test_a_lock_is_checked_before_anything_else(folder: Path) -> None:
    write_lock(folder)
    locked = open_checkpoint(folder)
    (folder / "model.lock").unlink()
    assert open_checkpoint(folder).revision == locked.revision
    write_lock(folder)
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (folder / "model.safetensors").write_bytes(raw)
    with pytest.raises(ModelBroken, match=r"model\.safetensors has the wrong checksum"):
        open_checkpoint(folder)


def test_a_lock_also_tells_of_files_that_went_or_came(folder: Path) -> None:
    write_lock(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(ModelBroken, match=r"is not in model\.lock"):
        open_checkpoint(folder)
    (folder / "model.safetensors.index.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ModelBroken, match=r"tokenizer_config\.json is missing"):
        open_checkpoint(folder)


# --- chat templates, which are programs too ---


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{% for m in messages %}{{ m.update({'role': 'x'}) }}{% endfor %}",
        "{{ messages.append(1) }}",
        "{{ range(10**9) | list }}",
        "{% include '/etc/passwd' %}",
        "{{ undefined_thing.attribute }}",
    ],
)
def test_a_template_can_only_write_text(folder: Path, template: str) -> None:
    edit(folder, "tokenizer_config.json", chat_template=template)
    with pytest.raises(ModelBroken, match="chat template"):
        ChatTokenizer(open_checkpoint(folder)).encode_chat([Message("user", "hello")])


@pytest.mark.parametrize("template", ["{% if %}", "x" * 300_000, 7])
def test_a_damaged_or_huge_template_is_broken(folder: Path, template: Any) -> None:
    edit(folder, "tokenizer_config.json", chat_template=template)
    with pytest.raises(ModelBroken, match="template"):
        ChatTokenizer(open_checkpoint(folder))


def test_a_template_in_its_own_file_or_in_a_list_is_found(folder: Path) -> None:
    wanted = ChatTokenizer(open_checkpoint(folder)).encode_chat([Message("user", "hello")])
    edit(
        folder,
        "tokenizer_config.json",
        chat_template=[{"name": "other", "template": "x"}, {"name": "default", "template": TEMPLATE}],
    )
    assert ChatTokenizer(open_checkpoint(folder)).encode_chat([Message("user", "hello")]) == wanted
    edit(folder, "tokenizer_config.json", chat_template=None)
    with pytest.raises(ModelUnsupported, match="no chat template"):
        ChatTokenizer(open_checkpoint(folder)).encode_chat([Message("user", "hello")])
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    assert ChatTokenizer(open_checkpoint(folder)).encode_chat([Message("user", "hello")]) == wanted


def test_a_template_may_refuse_a_conversation(folder: Path) -> None:
    edit(folder, "tokenizer_config.json", chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UsageError, match="roles must alternate"):
        ChatTokenizer(open_checkpoint(folder)).encode_chat([Message("user", "hello")])


def test_a_broken_tokenizer_is_told(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model": {"type": "nonsense"}}')
    with pytest.raises(ModelBroken, match=r"tokenizer\.json"):
        ChatTokenizer(open_checkpoint(folder))
