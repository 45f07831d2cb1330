"""CLIP_benchmark's loader gives what `siglip2.load` gives, and evaluators write its JSON."""

import json
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from webdataset import TarWriter

from siglip2.api import load
from siglip2.cli.training import SigLIP2CLI
from siglip2.clip_benchmark import MODEL_TYPE, load_siglip2, main, register
from siglip2.core.callbacks.benchmark_json import ClipBenchmarkJSON
from siglip2.core.interop.export import write
from siglip2.core.interop.weights import assemble, native_pixels, square_pixels
from siglip2.core.model.sizes import ShapeOptions
from siglip2.core.model.two_towers import build_two_towers
from siglip2.testing import tiny_tokenizer

TEXTS = ["a red disc", "two discs, and much more than there is room for in so few ids"]
COLOURS = ["red", "green", "blue"]


@pytest.fixture(scope="module", params=[False, True], ids=["fixed", "naflex"])
def released(request, tmp_path_factory):
    """A folder with small random weights."""
    torch.manual_seed(0)
    tokenizer, native = tiny_tokenizer(), request.param
    text = {"vocab_size": tokenizer.vocab_size, "context_length": tokenizer.contract.length}
    small = ShapeOptions(width=48, depth=1, mlp_dim=82, num_heads=4)
    model = build_two_towers("tiny/16", patch_size=16, grid=(4, 4), vision=small, text=small, **text)
    pixels = native_pixels(16, 4) if native else square_pixels(64, 16, filter="bicubic")
    about = {"heads": {"vision": 4, "text": 4}, "native": native, "pixels": pixels, "tokenizer": tokenizer}
    folder = tmp_path_factory.mktemp("released") / "released"
    weights = assemble("siglip2", model.state_dict(), place="test", **about)
    return str(write(weights, "big_vision", folder, check=False).folder)


def pictures():
    """Pictures of noise in odd sizes, one of them much longer than wide."""
    rng = np.random.default_rng(0)
    sizes = [(64, 64), (40, 90), (600, 17), (3, 3)]
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


def test_loader_embeds_as_the_model_does(released):
    model, transform, tokenizer = load_siglip2("any", pretrained=released, cache_dir=None, device="cpu")
    model.eval()
    expected = load(released, "cpu")
    stacked = torch.utils.data.default_collate([transform(picture) for picture in pictures()])
    with torch.no_grad():
        z_image, z_text = model.encode_image(stacked), model.encode_text(tokenizer(TEXTS))
    torch.testing.assert_close(z_image, expected.encode_image(pictures()), atol=1e-6, rtol=0)
    torch.testing.assert_close(z_text, expected.encode_text(TEXTS), atol=1e-6, rtol=0)


def test_registering_twice_adds_one_model_type(monkeypatch):
    package, models = ModuleType("clip_benchmark"), ModuleType("clip_benchmark.models")
    models.TYPE2FUNC, models.MODEL_TYPES = {}, ["open_clip"]
    package.models = models
    monkeypatch.setitem(sys.modules, "clip_benchmark", package)
    monkeypatch.setitem(sys.modules, "clip_benchmark.models", models)
    register()
    register()
    assert models.MODEL_TYPES == ["open_clip", MODEL_TYPE]
    assert {MODEL_TYPE: load_siglip2} == models.TYPE2FUNC


def run_benchmark(model, dataset, folder, monkeypatch):
    """Runs CLIP_benchmark's own command line on a data set of ours; returns what it writes."""
    out = folder / "result.json"
    given = {"model_type": MODEL_TYPE, "model": "siglip2", "pretrained": model, "num_workers": "0", "output": out}
    given |= {"dataset": dataset, "dataset_root": folder / "data"}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["clip_benchmark", "eval", "--no_amp", *words])
    with pytest.raises(SystemExit) as done:
        main()
    assert not done.value.code
    return json.loads(out.read_text())


def write_set(folder, texts, **words):
    """Writes six plain pictures as CLIP_benchmark reads them, with a caption or a class each."""
    (folder / "data" / "test").mkdir(parents=True)
    with TarWriter(str(folder / "data" / "test" / "0.tar")) as tar:
        for number in range(6):
            picture = Image.new("RGB", (40 + number, 50), COLOURS[number % 3])
            tar.write({"__key__": f"{number}", "png": picture, **texts(number)})
    for name, content in {**words, "test/nshards": "1"}.items():
        (folder / "data" / f"{name}.txt").write_text(content)


@pytest.mark.filterwarnings("ignore")
def test_clip_benchmark_itself_retrieves_with_one_of_our_models(released, tmp_path, monkeypatch):
    write_set(tmp_path, lambda n: {"txt": f"{COLOURS[n % 3]} picture {n}"}, dataset_type="retrieval")
    result = run_benchmark(released, "wds/mscoco_captions", tmp_path, monkeypatch)
    assert (result["model"], result["task"]) == ("siglip2", "zeroshot_retrieval")
    assert set(result["metrics"]) == {"image_retrieval_recall@5", "text_retrieval_recall@5"}


@pytest.mark.filterwarnings("ignore")
def test_clip_benchmark_itself_classifies_as_the_model_ranks(released, tmp_path, monkeypatch):
    write_set(
        tmp_path,
        lambda n: {"cls": str(n % 3)},
        classnames="\n".join(COLOURS),
        zeroshot_classification_templates="a {c} picture",
    )
    metrics = run_benchmark(released, "wds/colours", tmp_path, monkeypatch)["metrics"]
    model = load(released, "cpu")
    best = [
        model.rank(Image.new("RGB", (40 + n, 50), COLOURS[n % 3]), COLOURS, templates=["a {} picture"])[0].text
        for n in range(6)
    ]
    assert metrics["acc1"] == pytest.approx(sum(best[n] == COLOURS[n % 3] for n in range(6)) / 6)
    assert metrics["mean_per_class_recall"] == pytest.approx(metrics["acc1"])  # classes are of one size


def test_evaluators_write_the_schema_of_clip_benchmark(toy_shards, toy_tokenizer, tmp_path):
    out = tmp_path / "scores"
    classes = tmp_path / "classes.json"
    classes.write_text(json.dumps({"classes": [f"class {i}" for i in range(16)]}))
    sets = {"retrieval": {"pairs": {"path": str(toy_shards)}}}
    sets["zero_shot"] = {"discs": {"path": str(toy_shards), "classes": str(classes)}}
    writer = {"class_path": f"{ClipBenchmarkJSON.__module__}.ClipBenchmarkJSON", "init_args": {"folder": str(out)}}
    options = {"data.train.path": toy_shards, "data.tokenizer": toy_tokenizer, "trainer.default_root_dir": tmp_path}
    options |= {f"data.{name}": json.dumps(value) for name, value in sets.items()}
    options["trainer.limit_val_batches"] = 1.0
    options["trainer.callbacks"] = json.dumps([writer])
    cli = SigLIP2CLI(["--config", "tests/tiny.yaml", *(f"--{n}={v}" for n, v in options.items())], command="validate")
    cli.trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False)
    assert {path.name for path in out.iterdir()} == {
        "pairs_zeroshot_retrieval.json",
        "discs_en_zeroshot_classification.json",
    }
    found = {content["task"]: content for content in (json.loads(path.read_text()) for path in out.iterdir())}
    retrieval, classified = found["zeroshot_retrieval"], found["zeroshot_classification"]
    assert set(retrieval) == {"dataset", "model", "pretrained", "task", "metrics", "language"}
    assert retrieval["pretrained"] == "step=0"
    assert retrieval["metrics"]["image_retrieval_recall@5"] == cli.retrieval.rows[0].text_to_image[5]
    assert retrieval["metrics"]["text_retrieval_recall@5"] == cli.retrieval.rows[0].image_to_text[5]
    row = cli.zero_shot.rows[0]
    expected = {"acc1": row.top1, "acc5": row.top5, "mean_per_class_recall": row.mean_per_class_recall}
    assert classified["metrics"] == expected
    assert (classified["dataset"], classified["language"]) == ("discs", "en")
