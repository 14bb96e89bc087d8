"""Bad models: weights, indices, configurations, tokenizers, adapters, foreign code."""

import json
import math
import os
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from .cases import PLACES, Case, Draw, damage, kind, misplace, read_json, write_json
from .world import COMMANDS


WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CANARY = "canary"


def in_header(draw: Draw, file: Path) -> tuple[str, str | None]:
    """Damage the bytes of a file of safetensors; what, and why it may do no harm."""
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    head, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
    name = draw.choice([name for name in head if name != "__metadata__"])
    how = draw.choice(("cut", "length", "bits", "dtype", "dtype", "data_offsets", "shape", "none", "twice"))
    odd = {
        "dtype": ("I32", "F99", "BF16", "F64", "F8_E4M3", "BOOL", 7, None),
        "data_offsets": ([0, 2**50], [-4, 4], [4, 0], "0", [0]),
        "shape": ([2**40, 2**40], [-1], "a", [0]),
    }
    if how in odd:
        head[name][how] = draw.choice(odd[how])
    text = json.dumps(head).encode()
    if how == "twice":
        text = text[:-1] + f', "{name}": {json.dumps(head[name])}}}'.encode()
    whole = len(text).to_bytes(8, "little") + text + rest
    if how == "cut":
        whole = whole[: draw.randrange(len(whole))]
    elif how == "length":
        whole = draw.choice((0, 2**40, 2**63 + 1, len(whole) + 1)).to_bytes(8, "little") + whole[8:]
    elif how == "bits":
        place = whole.index(f'"{name}"'.encode()) + 1 + draw.randrange(len(name))
        whole = whole[:place] + bytes([whole[place] ^ (1 << draw.randrange(8))]) + whole[place + 1 :]
    elif how == "none":
        whole = draw.choice((b"", b"\0" * 8, b"PK\x03\x04" * 50, b"<html>not found</html>"))
    file.write_bytes(whole)
    return f"header: {how} ({name})", "twice the same" if how == "twice" else None


def in_tensors(draw: Draw, file: Path) -> tuple[str, str | None]:
    """Change one tensor of a file of safetensors; what, and why it may do no harm."""
    tensors, fine = load_file(file), None
    name = draw.choice(sorted(tensors))
    value = tensors[name]
    how = draw.choice(("nan", "inf", "huge", "missing", "extra", "renamed", "shape", "shape", "dtype", "prefix"))
    if how in ("nan", "inf", "huge"):
        value.reshape(-1)[draw.randrange(value.size)] = {"nan": math.nan, "inf": -math.inf, "huge": 3e38}[how]
        fine = "finite numbers are weights" if how == "huge" else None
    elif how == "missing":
        del tensors[name]
    elif how == "extra":
        tensors[draw.choice(("extra.weight", "model.layers.9.mlp.up_proj.weight", "lm_head.bias", "a\nb"))] = value
    elif how == "renamed":
        tensors[name + draw.choice(("_", ".weight", " "))] = tensors.pop(name)
    elif how == "shape":
        flat = value.reshape(-1)
        tensors[name] = draw.choice((flat[:-1], np.stack([value, value]), flat[:0], value[..., :-1], flat[0]))
    elif how == "dtype":
        tensors[name] = value.astype(draw.choice((np.int8, np.int32, np.uint8, np.bool_, np.complex64)))
    else:
        first = draw.choice(("module.", "_orig_mod.", "base_model.", "student."))
        tensors = {first + name: value for name, value in tensors.items()}
        fine = "a wrapper's prefix is known" if first in ("module.", "_orig_mod.") else None
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, file, {"format": "pt"})
    return f"{how} ({name})", fine


@kind(4)
def weights(draw: Draw) -> Case:
    name, model, folder = draw.command("w")
    fine, how = None, draw.randrange(10)
    if how < 4:
        said, fine = in_header(draw, folder / WEIGHTS)
    elif how < 9:
        said, fine = in_tensors(draw, folder / WEIGHTS)
    else:
        misplace(folder / WEIGHTS, said := draw.choice(PLACES))
    return Case(name, f"weights of {model}: {said}", fine)


@kind(2)
def index(draw: Draw) -> Case:
    name = draw.choice([name for name, it in COMMANDS.items() if "w" in it.reads and "in/rigpt" in it.models])
    folder, fine = draw.work / "in/rigpt", None
    (folder / WEIGHTS).unlink()
    for file in (draw.work / "in/sharded").glob("model*"):
        shutil.copy(file, folder)
    content = read_json(folder / INDEX)
    places = content["weight_map"]
    key, shards = draw.choice(sorted(places)), sorted(set(places.values()))
    how = draw.choice(("missing", "absolute", "parent", "link", "type", "no map", "lacking", "more", "another", "name",
        "stale", "damaged", "shard"))  # fmt: skip
    if how == "missing":
        (folder / draw.choice(shards)).unlink()
    elif how in ("absolute", "parent", "link"):
        old, outside = places[key], draw.work / "mine/outside.safetensors"
        shutil.move(folder / old, outside)
        given = {"absolute": str(outside), "parent": "../../mine/outside.safetensors", "link": old}[how]
        if how == "link":
            os.symlink(outside, folder / given)
        content["weight_map"] = {n: given if shard == old else shard for n, shard in places.items()}
        # Only publishing would give away what lies elsewhere.
        fine = None if name in ("publish", "space") else "the same weights, in another place"
    elif how == "type":
        content["weight_map"] = draw.choice(([], "all", 7, None, {}, [shards[0]]))
    elif how == "no map":
        content = draw.choice(({}, {"metadata": {}}, [content], None))
    elif how == "lacking":
        del places[key]
        fine = "the shard has it all the same"
    elif how == "more":
        places["model.more.weight"] = shards[0]
    elif how == "another":
        places[key] = next(shard for shard in shards if shard != places[key])
        fine = "its own shard is read, too"
    elif how == "name":
        places[key] = draw.choice((7, None, "", "config.json", "x" * 300, ".", [shards[0]], "model\0.safetensors"))
    elif how == "stale":
        shutil.copy(draw.work / "in/other" / WEIGHTS, folder)
        (folder / shards[0]).unlink()
        fine = "the single file counts"
    elif how == "shard":
        how, fine = in_header(draw, folder / draw.choice(shards))
    write_json(folder / INDEX, content)
    return Case(name, f"index: {damage(draw, folder / INDEX) if how == 'damaged' else how}", fine)


ODD = ("text", "", -1, 0, 1, 1.5, math.nan, math.inf, 1e308, 10**9, 10**400, None, [], [1, 2], {}, {"a": {"b": []}},
    True, False, "x" * 5000, [[[[[[]]]]]])  # fmt: skip
# Fields that have no part in the function of a language model that is given its tokens.
UNUSED = (
    r"_name_or_path|(bos|eos|pad)_token_id|(torch_)?dtype|transformers_version|use_cache|summary_.*|pretraining_tp|"
    "add_cross_attention|architectures|reorder_and_upcast_attn|auto_map"
)
FOLLOW = (
    "head_dim|num_key_value_heads|intermediate_size|n_inner|rope_parameters|embedding_size|depth_solver|"
    "value_embedding_period|sliding_window"
)
FREE = "depth_[ra]tol|layer_norm_epsilon|rms_norm_eps|max_position_embeddings|rope_theta"


def harmless(name: str, value: object, old: object, weights: bool = True) -> str | None:
    """Why a field of a configuration may have this value, beside weights or alone; `None` if it may not."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf
    reasons = {
        "the value it had": type(value) is type(old) and value == old,
        "no part in the function": re.fullmatch(UNUSED, name),
        "follows from the other fields": value in (None, {}) and re.fullmatch(FOLLOW, name),
        "for new weights only": name == "initializer_range" and number and value >= 0,
        "another function, of the same weights": (re.fullmatch(FREE, name) and number and value > 0)
        or (isinstance(old, bool) and isinstance(value, bool) and not name.endswith(("bias", "tie_word_embeddings"))),
        "there are no weights that it could not fit": not weights and type(value) is int and value > 0,
        "a probability": name.endswith(("dropout", "pdrop")) and number and 0 <= value < 1,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def odd_field(draw: Draw, file: Path, weights: bool = True) -> tuple[str, str | None]:
    """Give a field of a configuration, or of its rotary part, an odd value; what, and why it may do no harm."""
    content = inside = read_json(file)
    if content.get("rope_parameters") and draw.random() < 0.15:
        inside = content["rope_parameters"]
    name, value = draw.choice(sorted(inside)), draw.choice(ODD)
    old, inside[name] = inside[name], value
    write_json(file, content)
    return f"{name}: {str(value)[:40]!r} for {old!r}", harmless(name, value, old, weights)


@kind(6)
def config(draw: Draw) -> Case:
    name, model, folder = draw.command("c")
    file = folder / "config.json"
    weights = "w" in COMMANDS[name].reads
    said, fine = odd_field(draw, file, weights) if draw.random() < 0.8 else (damage(draw, file), None)
    return Case(name, f"config of {model}: {said}", fine)


@kind(1)
def generation(draw: Draw) -> Case:
    name, model, folder = draw.command("w")
    file = folder / "generation_config.json"
    odd = {"do_sample": False, "temperature": 0.9, "top_p": 0.6, "max_length": 20}
    write_json(file, read_json(file) | odd)
    said = odd_field(draw, file)[0] if draw.random() < 0.6 else damage(draw, file)
    return Case(name, f"generation config of {model}: {said}", "how to sample says nothing about the model")


ENDLESS = "{% for i in range(10**9) %}{% for j in range(10**9) %}{% endfor %}{% endfor %}"
TEMPLATES = ("{{ 1/0 }}", "{% for", "{{ messages.nothing.at }}", "{{ raise_exception('no') }}", ENDLESS, "", "x",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}")  # fmt: skip
WITH_TEXT = ("verify-stock", "merge", "charges-measure", "evaluate", "prepare", "finetune", "chat")


@kind(2)
def tokenizer(draw: Draw) -> Case:
    name, model, folder = draw.command("t")
    fine = None if name in WITH_TEXT else "no text is read"
    if model != COMMANDS[name].models[0]:
        fine = "the first has a tokenizer"
    settings, content = folder / "tokenizer_config.json", folder / "tokenizer.json"
    how = draw.choice(("json", "settings", "class", "ids", "type", "template", "missing", "special"))
    said: object = ""
    if how in ("json", "settings"):
        said = damage(draw, content if how == "json" else settings)
        if how == "settings" and re.search("nothing|folder|itself", str(said)):
            fine = "the other file says it all"
    elif how == "missing":
        content.unlink()
    elif how == "template":
        said, fine = draw.choice(TEMPLATES), "no chat is written"
        (folder / "chat_template.jinja").write_text(str(said))
    elif how in ("class", "special"):
        said = draw.choice((7, [], {"a": 1}, "Never", None, True, "LlamaTokenizer"))
        key = "tokenizer_class" if how == "class" else "eos_token"
        write_json(settings, read_json(settings) | {key: said})
        fine = "the tokenizer's file says it all"
    else:
        whole = read_json(content)
        if how == "ids":
            fine = "nothing but the data needs the ids" if name == "prepare" else fine
            whole["model"]["vocab"] = {word: 1000 + n for word, n in whole["model"]["vocab"].items()}
        else:
            said = whole["model"]["type"] = draw.choice(("BPE", "None", 7, None))
        write_json(content, whole)
    return Case(name, f"tokenizer of {model}: {how} {said!r}", fine)


@kind(1)
def adapter(draw: Draw) -> Case:
    name, model, folder = draw.command("c")
    said = draw.choice(("beside", "instead", "damaged"))
    if said == "instead":
        shutil.rmtree(folder)
        shutil.copytree(draw.work / "in/adapter", folder)
    else:
        shutil.copy(draw.work / "in/adapter/adapter_config.json", folder)
    if said == "damaged":
        said = damage(draw, folder / "adapter_config.json")
    fine = "the configuration is there" if name == "info" and said != "instead" else None
    return Case(name, f"adapter, {said}, of {model}", fine)


@kind(1)
def quantised(draw: Draw) -> Case:
    name, model, folder = draw.command("w")
    methods = ("bitsandbytes", "gptq", "awq", "fp8", "compressed-tensors", "quanto", "torchao", "new", 7)
    said = draw.choice(({"quant_method": draw.choice(methods), "bits": 4},) * 3 + ("int8", [], 7))
    write_json(folder / "config.json", read_json(folder / "config.json") | {"quantization_config": said})
    return Case(name, f"quantised: {said!r}, {model}")


class Planted:
    """Unpickled, it makes a file."""

    def __init__(self, place: str):
        self.place = place

    def __reduce__(self):
        return open, (self.place, "w")


@kind(2)
def code(draw: Draw) -> Case:
    name, model, folder = draw.command("c")
    planted, fine = str(draw.work / CANARY), "the code is not run"
    (folder / "evil.py").write_text(f"open({planted!r}, 'w')\nclass A: pass\n")
    content, settings = read_json(folder / "config.json"), folder / "tokenizer_config.json"
    said = draw.choice(("unknown type", "known type", "elsewhere", "tokenizer", "pickle", "pickle", "beside", "ours"))
    if said in ("unknown type", "known type", "elsewhere"):
        place = ("me/evil--" if said == "elsewhere" else "") + "evil.A"
        content["auto_map"] = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoModel"), place)
        if said != "known type":
            content["model_type"], fine = "evil", None
        write_json(folder / "config.json", content)
    elif said == "tokenizer":
        odd = {"auto_map": {"AutoTokenizer": ["evil.A"] * 2}, "tokenizer_class": draw.choice(("A", "GPT2Tokenizer"))}
        write_json(settings, read_json(settings) | odd)
    elif said == "ours":
        for file in folder.glob("*_rigpt.py"):
            file.write_text(f"open({planted!r}, 'w')\n")
        fine = None if name in ("publish", "space") and model == "in/rigpt" else fine
    else:
        files = ("pytorch_model.bin", "training_args.bin", "optimizer.pt")
        if said == "pickle":
            (folder / WEIGHTS).unlink()
            files, fine = (draw.choice(("pytorch_model.bin", WEIGHTS)),), None if "w" in COMMANDS[name].reads else fine
        for file in files:
            (folder / file).write_bytes(pickle.dumps(Planted(planted)))
    return Case(name, f"foreign code, {said}, {model}", fine)
