"""What cannot be read is named, with the nearest known shape; nothing is executed, and no network is touched."""

import json
import os
import pickle
import re
import socket

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from siglip2.core.interop.detect import is_foreign, is_hub_id, read_weights
from siglip2.core.interop.export import write
from siglip2.core.interop.published import nearest, undescribed

FILES = {"hf": "model.safetensors", "open_clip": "open_clip_model.safetensors", "timm": "model.safetensors"}
FILES |= {"big_vision": "model.npz"}


@pytest.fixture
def exported(make_weights, tmp_path):
    """Writes small weights in a format; returns the folder."""
    return lambda format, **options: write(make_weights(**options), format, tmp_path / format, check=False).folder


class Bomb:
    """A pickle that would write a file where it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def assert_refused(path, mark, message="is refused: it is a pickle"):
    with pytest.raises(ValueError, match=message) as refused:
        read_weights(str(path))
    assert not mark.exists()
    assert "weights_only" not in str(refused.value)  # torch's advice is to load it all the same
    assert str(refused.value).isprintable()


class Shell(Bomb):
    """A pickle that would run a command: of a module that torch blocks by another message."""

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("name", ["epoch_1.pt", "step=5.ckpt"])
@pytest.mark.parametrize(("bomb", "held"), [(Bomb, "io.open"), (Shell, f"{os.name}.system")])
def test_what_a_pickle_would_call_is_named(bomb, held, name, tmp_path):
    mark = tmp_path / "executed"
    torch.save({"state_dict": {}, "extra": bomb(mark)}, tmp_path / name)
    assert_refused(tmp_path / name, mark, f"{name} is refused: it is a pickle that holds {held}, ")


@pytest.mark.parametrize("name", ["epoch_1.pt", "model.bin", "model.pth"])
def test_pickle_with_code_is_refused_and_never_executed(name, tmp_path):
    mark = tmp_path / "executed"
    torch.save({"state_dict": {"a": torch.zeros(1)}, "extra": Bomb(mark)}, tmp_path / name)
    assert_refused(tmp_path / name, mark)
    with (tmp_path / name).open("wb") as file:
        pickle.dump(Bomb(mark), file)
    assert_refused(tmp_path / name, mark)


def test_pickle_in_a_folder_of_transformers_is_refused_and_never_executed(exported, tmp_path):
    folder, mark = exported("hf"), tmp_path / "executed"
    (folder / FILES["hf"]).unlink()
    torch.save({"a": Bomb(mark)}, folder / "pytorch_model.bin")
    assert_refused(folder, mark)


def test_npz_with_objects_is_refused_and_never_executed(tmp_path):
    mark = tmp_path / "executed"
    np.savez(tmp_path / "model.npz", a=np.array([Bomb(mark)], dtype=object))
    assert_refused(tmp_path / "model.npz", mark, "it holds Python objects, which are never executed")


@pytest.mark.parametrize("format", list(FILES))
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_half_written_file_is_named(exported, format, share):
    path = exported(format) / FILES[format]
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=f"{path.name} cannot be read as .* half-written or damaged"):
        read_weights(str(path.parent))


def test_half_written_checkpoint_of_torch_is_named(tmp_path):
    torch.save({"visual.trunk.x": torch.zeros(999)}, tmp_path / "epoch.pt")
    (tmp_path / "epoch.pt").write_bytes((tmp_path / "epoch.pt").read_bytes()[:700])
    with pytest.raises(ValueError, match="epoch.pt cannot be read as a torch file .* half-written"):
        read_weights(str(tmp_path / "epoch.pt"))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_half_written_json_is_named(exported, name):
    folder = exported("hf")
    (folder / "siglip2_contract.json").unlink()
    (folder / name).write_text((folder / name).read_text()[:40])
    with pytest.raises(ValueError, match=name):
        read_weights(str(folder))


def shards(folder):
    """Cuts the weights of a folder of transformers into two files with an index."""
    tensors = load_file(folder / FILES["hf"])
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[:20], "model-2.safetensors": names[20:]}
    for part, held in parts.items():
        save_file({name: tensors[name] for name in held}, folder / part, metadata={"format": "pt"})
    places = {name: part for part, held in parts.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / FILES["hf"]).unlink()


def test_shards_are_read_as_one_and_a_lost_one_is_named(exported, make_weights):
    folder = exported("hf")
    shards(folder)
    state = read_weights(str(folder)).state
    assert [name for name, tensor in make_weights().state.items() if not torch.equal(tensor, state[name])] == []
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(ValueError, match="names model-2.safetensors, which is not beside it"):
        read_weights(str(folder))


def test_index_cannot_lead_out_of_its_folder(exported, tmp_path):
    folder = exported("hf")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    index = {"weight_map": {"a": "../other.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="is not beside it"):
        read_weights(str(folder))


def as_read(path):
    return dict(np.load(path)) if path.suffix == ".npz" else {n: t.numpy() for n, t in load_file(path).items()}


def rewrite(path, arrays):
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
        save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("format", list(FILES))
@pytest.mark.parametrize("shape", [(), (3,), (1, 2, 3, 4), (0, 4)])
def test_tensor_of_any_other_shape_is_an_error_that_says_so(exported, format, shape):
    """Whichever tensor it is: never another exception, and never weights that were made to fit."""
    path = exported(format) / FILES[format]
    arrays = as_read(path)
    once = re.compile(r"\b(layers|blocks|resblocks)\.[1-9]")  # of all layers the first
    said = "cannot be read as|do not fit|config.json says|MAP head|does not hold|no square|are missing"
    for name in [name for name in arrays if not once.search(name) and arrays[name].size > 1]:
        rewrite(path, {**arrays, name: np.zeros(shape, np.float32)})
        with pytest.raises(ValueError, match=said):
            read_weights(str(path.parent))


@pytest.mark.parametrize("format", list(FILES))
def test_file_without_layers_is_an_error(exported, format):
    path = exported(format) / FILES[format]
    layers = ("layers.", "blocks.", "encoderblock")
    rewrite(path, {name: array for name, array in as_read(path).items() if not any(part in name for part in layers)})
    with pytest.raises(ValueError, match="no layers|does not hold") as e:
        read_weights(str(path.parent))
    assert not re.search("Found .* and depth .*;", str(e.value))  # none was found


LAST = {
    ("hf", "vision"): "vision_model.encoder.layers.2.",
    ("hf", "text"): "text_model.encoder.layers.1.",
    ("open_clip", "vision"): "visual.trunk.blocks.2.",
    ("open_clip", "text"): "text.transformer.resblocks.1.",
    ("timm", "vision"): "blocks.2.",
}


@pytest.mark.parametrize(("format", "tower"), list(LAST))
def test_weights_without_their_last_layer_are_no_shallower_model(exported, format, tower):
    path = exported(format) / FILES[format]
    layer = LAST[format, tower]
    rewrite(path, {name: array for name, array in as_read(path).items() if not name.startswith(layer)})
    with pytest.raises(ValueError, match=rf"\d\d are missing \({re.escape(layer)}"):
        read_weights(str(path.parent))


@pytest.mark.parametrize(("layers", "missing"), [("img/Transformer/", "2/"), ("txt/Encoder_0/", "1/")])
def test_npz_without_its_last_layer_is_refused_where_the_depth_is_known_and_noted_elsewhere(exported, layers, missing):
    path = exported("big_vision") / FILES["big_vision"]
    stack = f"params/{layers}encoderblock/"
    rewrite(path, {n: array[:-1] if n.startswith(stack) else array for n, array in as_read(path).items()})
    with pytest.raises(ValueError, match=rf"16 are missing \({layers}encoderblock_{missing}"):
        read_weights(str(path.parent))
    (path.parent / "siglip2_contract.json").unlink()
    notes = [note for note in read_weights(str(path)).notes if "layers are missing at the end" in note]
    assert [note.split(" layers,")[0] for note in notes] == [
        f"the vision tower has {3 - ('img' in layers)}",
        f"the text tower has {2 - ('txt' in layers)}",
    ]


def test_depth_of_a_release_is_not_noted():
    assert undescribed("vision", 768, 12) == []
    assert len(undescribed("vision", 768, 11)) == 1


@pytest.mark.parametrize("format", ["hf", "open_clip", "timm"])
def test_missing_and_unknown_tensors_are_listed_with_the_nearest_known_shape(exported, format):
    path = exported(format) / FILES[format]
    tensors = load_file(path)
    lost = next(name for name in tensors if "mlp.fc1.weight" in name and "1" in name)
    tensors["something.else"] = tensors.pop(lost)
    if format == "open_clip":
        tensors["visual.trunk.something.else"] = tensors.pop("something.else")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match="1 are missing .*fc1.* and 1 are unknown .*something.else.*nearest known"
    ) as e:
        read_weights(str(path.parent))
    assert "google/siglip2" in str(e.value)


def test_missing_array_is_listed(exported):
    path = exported("big_vision") / "model.npz"
    arrays = dict(np.load(path))
    del arrays["params/txt/head/bias"]
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=r"1 are missing \(txt/head/bias\).*nearest known shape"):
        read_weights(str(path))


def test_model_of_another_type_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(ValueError, match="a model of type 'clip', expected siglip or siglip2"):
        read_weights(str(tmp_path))


def test_state_dict_of_another_architecture_is_named(tmp_path):
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7), "layer1.0.bn1.bias": torch.zeros(64)}, tmp_path / "r.pt")
    with pytest.raises(ValueError, match="r.pt holds another architecture .conv1.weight.*nearest known shape"):
        read_weights(str(tmp_path / "r.pt"))


def test_clip_of_open_clip_is_named_with_the_nearest_known_shape(tmp_path):
    clip = {"visual.conv1.weight": torch.zeros(768, 3, 32, 32), "transformer.resblocks.0.ln_1.weight": torch.zeros(512)}
    torch.save({"state_dict": {f"module.{n}": t for n, t in clip.items()}, "epoch": 3}, tmp_path / "epoch_3.pt")
    with pytest.raises(ValueError, match=r"but no SigLIP: .*width 768, patches .*siglip2-base-patch32-256"):
        read_weights(str(tmp_path / "epoch_3.pt"))


def test_trunk_without_pool_is_named(exported):
    path = exported("timm") / "model.safetensors"
    save_file({n: t for n, t in load_file(path).items() if not n.startswith("attn_pool")}, path)
    with pytest.raises(ValueError, match="has no MAP head .*siglip_gap"):
        read_weights(str(path.parent))


def test_tower_of_no_known_width_needs_a_configuration_for_its_heads(exported, tmp_path):
    tensors = load_file(exported("timm") / "model.safetensors")
    save_file(tensors, tmp_path / "alone.safetensors")
    with pytest.raises(ValueError, match="does not say how many attention heads .* nearest known shape"):
        read_weights(str(tmp_path / "alone.safetensors"))


@pytest.mark.parametrize(
    ("tower", "key", "value", "message"),
    [
        ("vision", "hidden_act", "quick_gelu", "hidden_act is 'quick_gelu', expected gelu_pytorch_tanh"),
        ("vision", "vision_use_head", False, "no MAP head"),
        ("text", "layer_norm_eps", 1e-5, "layer_norm_eps of the text tower is 1e-05"),
        ("text", "hidden_size", 768, "says hidden_size 768 of the text tower, the tensors have 32.*nearest known"),
        ("text", "vocab_size", 256000, "says vocab_size 256000 .*, the tensors have"),
        ("text", "max_position_embeddings", 77, "says max_position_embeddings 77 .*, the tensors have"),
        ("vision", "intermediate_size", 96, "says intermediate_size 96 of the vision tower, the tensors have 82"),
        ("vision", "image_size", 80, "says image_size 80 .* a position table of 4 x 4 patches of 16 px"),
        ("vision", "image_size", [64, 80], "says 64 x 80 px, expected squares"),
        ("vision", "num_hidden_layers", 4, "16 are missing .vision_model.encoder.layers.3"),
        ("vision", "num_hidden_layers", 2, "16 are unknown .vision_model.encoder.layers.2"),
        ("vision", "num_attention_heads", 5, "5 heads do not divide the vision tower's width 48"),
    ],
)
def test_configuration_that_ours_does_not_compute_is_named(exported, tower, key, value, message):
    folder = exported("hf")
    config = json.loads((folder / "config.json").read_text())
    config[f"{tower}_config"][key] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        read_weights(str(folder))


def edit(path, keys, value):
    """Changes a value of a JSON file, or takes it away (...)."""
    content = inner = json.loads(path.read_text())
    for key in keys[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[keys[-1]]
    else:
        inner[keys[-1]] = value
    path.write_text(json.dumps(content))


def test_layers_that_a_configuration_leaves_out_are_twelve(exported):
    folder = exported("hf")
    edit(folder / "config.json", ["vision_config", "num_hidden_layers"], ...)
    with pytest.raises(ValueError, match="144 are missing"):
        read_weights(str(folder))


IMAGES, WORDS = ["model_cfg", "vision_cfg"], ["model_cfg", "text_cfg"]


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        ([*WORDS, "no_causal_mask"], False, "no_causal_mask of the text tower is False .* expected True"),
        ([*WORDS, "no_causal_mask"], ..., "no_causal_mask of the text tower is False .* expected True"),
        ([*WORDS, "pool_type"], "argmax", "pool_type of the text tower is 'argmax'"),
        ([*WORDS, "norm_kwargs"], {}, "norm_kwargs of the text tower give an eps of 1e-05"),
        ([*WORDS, "layers"], 3, "12 are missing .text.transformer.resblocks.2"),
        ([*WORDS, "layers"], ..., "120 are missing .text.transformer.resblocks.10"),
        ([*WORDS, "width"], 48, "says width 48 of the text tower, the tensors have 32"),
        ([*WORDS, "mlp_ratio"], 4.0, "mlp_ratio. 128 of the text tower, the tensors have 56"),
        ([*WORDS, "vocab_size"], 99, "says vocab_size 99"),
        ([*WORDS, "context_length"], 99, "says context_length 99"),
        ([*WORDS, "proj_type"], "none", "says proj_type none of the text tower"),
        ([*IMAGES, "timm_pool"], "avg", "timm_pool of the vision tower is 'avg' .* expected 'map'"),
        ([*IMAGES, "timm_proj"], ..., "timm_proj of the vision tower is 'linear'"),
        ([*IMAGES, "image_size"], 80, "says patches along a side 5 of the vision tower, the tensors have 4"),
        (
            [*IMAGES, "timm_model_name"],
            "resnet50",
            "open_clip: .*timm's 'resnet50' is no vision transformer",
        ),
        ([*IMAGES, "timm_model_name"], "vit_base_patch32_siglip_256", "are missing .visual.trunk.blocks.10."),
        (["model_cfg", "embed_dim"], 64, "says embed_dim 64"),
        (["preprocess_cfg", "mean"], [0.48, 0.46, 0.41], "mean is .0.48.* our towers read pixels of mean and std 0.5"),
        (["preprocess_cfg", "std"], ..., "std is None, and our towers read pixels"),
    ],
)
def test_configuration_of_open_clip_that_ours_does_not_compute_is_named(exported, keys, value, message):
    folder = exported("open_clip")
    edit(folder / "open_clip_config.json", keys, value)
    with pytest.raises(ValueError, match=message):
        read_weights(str(folder))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 4}, "12 are missing .blocks.3."),
        ({"embed_dim": 96}, "says width 96 of the vision tower, the tensors have 48"),
        ({"mlp_ratio": 4.0}, "says mlp_dim 192 of the vision tower, the tensors have 82"),
        ({"patch_size": 8}, "says patch_size 8 of the vision tower, the tensors have 16"),
        ({"norm_layer": "layernormfp32", "global_pool": "avg"}, "no vision transformer with a MAP head"),
    ],
)
def test_trunk_of_another_shape_than_its_configuration_is_named(exported, arguments, message):
    folder = exported("timm")
    config = json.loads((folder / "config.json").read_text())
    edit(folder / "config.json", ["model_args"], config["model_args"] | arguments)
    with pytest.raises(ValueError, match=message):
        read_weights(str(folder))


@pytest.mark.parametrize("contract", [True, False])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image_mean", [0.48, 0.46, 0.41]),
        ("image_std", [0.5, 0.5, 0.4]),
        ("do_normalize", False),
        ("do_rescale", False),
        ("rescale_factor", 1.0),
    ],
)
def test_pixels_of_another_scale_are_named(exported, key, value, contract):
    folder = exported("hf")
    if not contract:
        (folder / "siglip2_contract.json").unlink()
    edit(folder / "processor_config.json", ["image_processor", key], value)
    said = re.escape(f"{key} is {value}, and our towers read pixels of mean and std 0.5")
    with pytest.raises(ValueError, match=said):
        read_weights(str(folder))


def test_side_of_pictures_may_be_one_number(exported):
    folder = exported("hf")
    expected = read_weights(str(folder)).pixels
    (folder / "siglip2_contract.json").unlink()
    edit(folder / "processor_config.json", ["image_processor", "size"], 70)
    assert read_weights(str(folder)).pixels == expected


@pytest.mark.parametrize(
    ("format", "file", "keys", "value"),
    [
        ("hf", "config.json", ["vision_config"], 3),
        ("hf", "config.json", ["vision_config", "num_hidden_layers"], "two"),
        ("hf", "config.json", ["vision_config", "patch_size"], 0),
        ("hf", "config.json", ["vision_config", "patch_size"], []),
        ("hf", "config.json", ["text_config", "num_attention_heads"], None),
        ("hf", "config.json", ["text_config", "num_attention_heads"], "two"),
        ("hf", "config.json", ["text_config", "layer_norm_eps"], "small"),
        ("hf", "config.json", ["text_config", "layer_norm_eps"], float("nan")),
        ("hf", "processor_config.json", ["image_processor"], 3),
        ("hf", "processor_config.json", ["image_processor", "image_mean"], "half"),
        ("hf", "siglip2_contract.json", ["text"], {}),
        ("open_clip", "open_clip_config.json", ["model_cfg"], []),
        ("open_clip", "open_clip_config.json", WORDS, "text"),
        ("open_clip", "open_clip_config.json", [*WORDS, "heads"], "two"),
        ("open_clip", "open_clip_config.json", [*WORDS, "norm_kwargs"], 1e-6),
        ("open_clip", "trunk/config.json", ["model_args", "num_heads"], 0),
        ("open_clip", "trunk/config.json", ["model_args", "nothing_of_timms"], 1),
        ("timm", "config.json", ["model_args"], 5),
        ("timm", "config.json", ["model_args", "patch_size"], 0),
        ("timm", "config.json", ["pretrained_cfg"], None),
        ("big_vision", "siglip2_contract.json", ["depth"], {"vision": "three"}),
    ],
)
def test_malformed_configuration_is_an_error_that_names_the_folder(exported, format, file, keys, value):
    folder = exported(format)
    edit(folder / file, keys, value)
    with pytest.raises(ValueError, match=re.escape(str(folder))):
        read_weights(str(folder))


def test_npz_of_texts_is_named(tmp_path):
    np.savez(tmp_path / "model.npz", names=np.array(["a", "b"]))
    with pytest.raises(ValueError, match="model.npz: the array 'names' has the type <U1, expected numbers"):
        read_weights(str(tmp_path / "model.npz"))


@pytest.mark.parametrize("format", ["hf", "open_clip"])
def test_tokenizer_with_more_ids_than_the_table_has_rows_is_named(exported, format):
    path = exported(format) / FILES[format]
    tensors = load_file(path)
    name = next(n for n in tensors if "token_embedding" in n)
    tensors[name] = tensors[name][:200].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    if format == "hf":
        edit(path.parent / "config.json", ["text_config", "vocab_size"], 200)
    else:
        edit(path.parent / "open_clip_config.json", [*WORDS, "vocab_size"], 200)
    with pytest.raises(ValueError, match="a tokenizer of another vocabulary, .* where the token table has 200 rows"):
        read_weights(str(path.parent))


@pytest.mark.parametrize("act", ["gelu", None])
def test_exact_gelu_is_read_and_noted(exported, act):
    folder = exported("hf")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"hidden_act": act} if act else {}
    (folder / "config.json").write_text(json.dumps(config))
    weights = read_weights(str(folder))
    assert weights.gelus == {"vision": "tanh", "text": "exact" if act else "tanh"}
    notes = [note for note in weights.notes if "set model.text.gelu to exact" in note]
    assert len(notes) == (act is not None)


def test_empty_folder_and_absent_file_are_named(tmp_path):
    with pytest.raises(ValueError, match="holds no weights that can be read .it holds nothing"):
        read_weights(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"there is nothing at .*gone.npz"):
        read_weights(str(tmp_path / "gone.npz"))


@pytest.fixture
def no_network(monkeypatch):
    """Every connection and every call of the hub's client fails the test."""

    def refuse(*arguments, **options):
        pytest.fail("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)


@pytest.mark.parametrize("format", list(FILES))
def test_local_path_touches_no_network(weights, format, tmp_path, no_network, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(weights, format, tmp_path / "runs" / "out")
    assert read_weights("runs/out").format == format  # looks like a hub id, and is there
    with pytest.raises(FileNotFoundError):
        read_weights("runs/other")  # not there, but its folder is


def test_hub_id_is_downloaded_and_read_as_a_folder(exported, monkeypatch):
    folder, asked = exported("hf"), []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda n, **options: asked.append(n) or str(folder))
    assert read_weights("google/siglip2-base-patch16-224").format == "hf"
    assert read_weights("hf-hub:google/siglip2-base-patch16-224").format == "hf"
    assert set(asked) == {"google/siglip2-base-patch16-224"}


def test_unreachable_hub_is_said(monkeypatch):
    def refuse(*arguments, **options):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ValueError, match="no local path, and as a hub id .*no route to host.* give its folder"):
        read_weights("google/siglip2-base-patch16-224")


@pytest.mark.parametrize(
    ("text", "hub"),
    [("google/siglip2-base-patch16-224", True), ("/abs/path", False), ("a/b/c", False), ("runs/last.ckpt", False)],
)
def test_hub_ids_are_told_from_paths(text, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id(text) == hub
    assert is_foreign(text) == hub


def test_nearest_shape_is_that_of_the_checkpoint_itself_where_there_is_one():
    assert "google/siglip2-so400m-patch14-224 (So400m/14" in nearest(1152, 27, 14)
    assert "google/siglip2-large-patch16-256 " in nearest(1000, 24, 16)
