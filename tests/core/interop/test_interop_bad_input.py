"""What cannot be read is named, with the nearest known shape; nothing is executed, and no network is touched."""

import json
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
from siglip2.core.interop.published import nearest

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
    with pytest.raises(ValueError, match=message):
        read_weights(str(path))
    assert not mark.exists()


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
    with pytest.raises(ValueError, match="no layers|does not hold"):
        read_weights(str(path.parent))


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
    with pytest.raises(ValueError, match=r"but no SigLIP: .*width 768 .*siglip2-base-patch32-256"):
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


@pytest.mark.parametrize("key", ["image_mean", "image_std"])
def test_pixels_of_another_scale_are_named(exported, key):
    folder = exported("hf")
    (folder / "siglip2_contract.json").unlink()
    processor = json.loads((folder / "processor_config.json").read_text())
    processor["image_processor"][key] = [0.48, 0.46, 0.41]
    (folder / "processor_config.json").write_text(json.dumps(processor))
    with pytest.raises(ValueError, match=f"{key} is .*0.48.*our towers read pixels of mean and std 0.5"):
        read_weights(str(folder))


@pytest.mark.parametrize("format", ["hf", "open_clip"])
def test_tokenizer_with_more_ids_than_the_table_has_rows_is_named(exported, format):
    path = exported(format) / FILES[format]
    tensors = load_file(path)
    name = next(n for n in tensors if "token_embedding" in n)
    tensors[name] = tensors[name][:200].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    if format == "hf":
        config = json.loads((path.parent / "config.json").read_text())
        config["text_config"]["vocab_size"] = 200
        (path.parent / "config.json").write_text(json.dumps(config))
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
