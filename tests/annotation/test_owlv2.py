"""OWLv2 through our detector says what transformers says: the same boxes in pixels, the same best query, its score."""

# N boxes, Q queries

import pytest
import torch
from PIL import Image

from siglip2.annotation.detector import Question, plain
from siglip2.annotation.owlv2 import CLIP_BEST, Owlv2, fingerprint
from siglip2.annotation.queries import Query, ngram_queries
from siglip2.annotation.settings import Settings
from siglip2.annotation.walk import annotate
from siglip2.core.data.fields import Sample
from siglip2.core.data.tar_source import TarSource
from siglip2.core.regions import regions

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

TEXTS = ("red disc", "a gold box", "cat", "green box")
LENGTH = 48  # tokens, which are letters here
SIZES = ((40, 64), (64, 40), (48, 48), (3, 90))  # height, width


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random OWLv2 with a CLIP tokenizer of single letters, as `save_pretrained` writes them."""
    from transformers import CLIPTokenizer, Owlv2Config, Owlv2ForObjectDetection, Owlv2ImageProcessor, Owlv2Processor

    letters = [*"abcdefghijklmnopqrstuvwxyz.,'-"]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={word: number for number, word in enumerate(words, start=1)} | {"!": 0}, merges=[], pad_token="!"
    )
    tokenizer.model_max_length = LENGTH
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Owlv2Config(
        text_config={
            **tower,
            "vocab_size": len(words) + 1,
            "max_position_embeddings": LENGTH,
            "bos_token_id": len(words) - 1,
            "eos_token_id": len(words),
        },
        vision_config={**tower, "image_size": 64, "patch_size": 16},
        projection_dim=32,
    )
    torch.manual_seed(0)
    model = Owlv2ForObjectDetection(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:  # the usual initialisation is so small that all boxes look alike
            parameter.data = torch.randn_like(parameter) * (0.5 if "embedding" in name else parameter.shape[-1] ** -0.5)
    path = tmp_path_factory.mktemp("owlv2")
    model.save_pretrained(path)
    Owlv2Processor(Owlv2ImageProcessor(size={"height": 64, "width": 64}), tokenizer).save_pretrained(path)
    return path


def question(size, texts=TEXTS, *, seed=0, weights=None):
    height, width = size
    image = torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    queries = tuple(Query(text, weight=w) for text, w in zip(texts, weights or [1.0] * len(texts), strict=True))
    return Question(image, queries, Sample("0", "toy", {}))


def by_transformers(folder, question, texts):
    """Boxes in pixels, scores and labels as transformers' own pipeline gives them, in the order of the patches."""
    from transformers import Owlv2ForObjectDetection, Owlv2Processor

    processor = Owlv2Processor.from_pretrained(folder)
    model = Owlv2ForObjectDetection.from_pretrained(folder).eval()
    picture = Image.fromarray(question.image.permute(1, 2, 0).numpy())
    inputs = processor(text=[list(texts)], images=picture, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    sizes = [tuple(question.image.shape[1:])]
    found = processor.post_process_grounded_object_detection(outputs, threshold=0.0, target_sizes=sizes)[0]
    return found["boxes"], found["scores"], found["labels"], outputs.logits[0]


@pytest.mark.parametrize("size", SIZES)
def test_boxes_scores_and_labels_are_those_of_transformers(folder, size):
    asked = question(size)
    found = Owlv2(str(folder), templates="none").detect([asked])[0]
    boxes, scores, labels, _ = by_transformers(folder, asked, TEXTS)
    assert found.boxes.shape == (16, 4)
    assert torch.allclose(found.boxes, boxes, atol=1e-3)
    assert torch.allclose(found.scores, scores, atol=1e-5)
    assert found.queries.tolist() == labels.tolist()
    assert scores.std() > 0.001  # not all the same


def test_pictures_of_a_batch_do_not_see_one_another(folder):
    detector = Owlv2(str(folder), templates="none")
    asked = [question(size, TEXTS[: k + 1], seed=k) for k, size in enumerate(SIZES)]
    for together, one in zip(detector.detect(asked), asked, strict=True):
        alone = detector.detect([one])[0]
        assert torch.allclose(together.boxes, alone.boxes, atol=1e-3)
        assert torch.allclose(together.scores, alone.scores, atol=1e-5)
        assert together.queries.tolist() == alone.queries.tolist()


def test_the_ensemble_is_the_mean_of_the_logits_of_seven_prompts(folder):
    asked = question((40, 64))
    found = Owlv2(str(folder)).detect([asked])[0]
    # the full stop of the templates is taken out, too, as in the reference evaluator
    logits = [by_transformers(folder, asked, [plain(t.format(x)) for x in TEXTS])[3] for t in CLIP_BEST]
    expected = torch.stack(logits).mean(dim=0).sigmoid().max(dim=-1)
    assert torch.allclose(found.scores, expected.values, atol=1e-5)
    assert found.queries.tolist() == expected.indices.tolist()


def test_a_weight_acts_before_queries_are_compared(folder):
    detector = Owlv2(str(folder), templates="none")
    *_, logits_NQ = by_transformers(folder, question((48, 48)), TEXTS)
    expected = (logits_NQ.sigmoid() * torch.tensor([1.0, 0.9, 1.0, 1.0])).max(dim=-1)
    found = detector.detect([question((48, 48), weights=[1.0, 0.9, 1.0, 1.0])])[0]
    assert torch.allclose(found.scores, expected.values, atol=1e-5)
    assert found.queries.tolist() == expected.indices.tolist()
    assert found.queries.tolist() != logits_NQ.argmax(dim=-1).tolist()  # the weight matters here


def test_a_text_longer_than_the_tower_is_cut_and_one_of_punctuation_never_wins(folder):
    long = "a text of ten words that has more than 48 letters"
    asked = question((48, 48), (long, "--", "!!"), seed=3)
    found = Owlv2(str(folder)).detect([asked])[0]
    assert found.queries.tolist() == [0] * 16
    assert found.scores.min() > 0


def test_a_very_large_picture_is_shrunk_first_and_its_boxes_are_in_its_own_pixels(folder, monkeypatch):
    image = torch.full((3, 40, 64), 90, dtype=torch.uint8)  # of one colour, so that shrinking changes little
    asked = Question(image, question((40, 64)).queries, Sample("0", "toy", {}))
    detector = Owlv2(str(folder))
    whole = detector.detect([asked])[0]
    monkeypatch.setattr("siglip2.annotation.owlv2.LARGEST", 32)
    seen = []
    preprocess = detector.preprocess
    detector.preprocess = lambda images, **more: seen.extend(images) or preprocess(images, **more)
    shrunk = detector.detect([asked])[0]
    assert [tuple(picture.shape) for picture in seen] == [(3, 20, 32)]
    assert torch.allclose(shrunk.boxes, whole.boxes, atol=0.5)  # the edge to the padding is blurred otherwise
    assert torch.allclose(shrunk.scores, whole.scores, atol=0.01)


def test_texts_embedded_beforehand_score_as_those_embedded_with_the_picture(folder):
    asked = question((40, 64))
    before = Owlv2(str(folder), fixed=TEXTS[:2]).detect([asked])[0]
    after = Owlv2(str(folder)).detect([asked])[0]
    assert torch.allclose(before.scores, after.scores, atol=1e-5)
    assert before.queries.tolist() == after.queries.tolist()


def test_bfloat16_is_near_float32(folder):
    asked = question((40, 64))
    half, full = (Owlv2(str(folder), dtype=dtype).detect([asked])[0] for dtype in ("bfloat16", "float32"))
    assert half.boxes.dtype == half.scores.dtype == torch.float32
    assert not torch.equal(half.scores, full.scores)
    assert torch.allclose(half.scores, full.scores, atol=0.05)
    assert torch.allclose(half.boxes, full.boxes, atol=2.0)


def test_shards_annotated_by_a_model_hold_regions_that_can_be_read(folder, toy_shards, tmp_path):
    options = {"threshold": 0.0, "categories": ("cat", "box"), "category_factor": 1.0, "nms": 0.05}
    settings = Settings(detector=f"owlv2:{folder}", caption="json.caption", batch_size=3, **options)
    made = annotate(str(toy_shards), str(tmp_path / "out"), settings, devices=["cpu"])
    source = TarSource(str(tmp_path / "out"), fields=settings.fields)
    for sample in map(source.read, range(16)):
        asked = {query.text for query in ngram_queries({"en": sample.captions()["en"]})} | {"cat", "box"}
        found = {text for region in regions(sample) for text in region.captions["en"]}
        assert found
        assert found <= asked
        assert sample.notes == []
    assert made.counts["boxes"] == 16 * 16
    assert min(made.counts[name] for name in ("suppressed", "kept_ngram", "kept_category")) > 0


def test_unknown_templates_are_an_error_that_names_the_known(folder):
    with pytest.raises(ValueError, match="no templates called 'clip-80'; known: clip-7, none"):
        Settings(detector=f"owlv2:{folder}", templates="clip-80").recorded()


def test_a_model_is_recorded_by_what_its_files_hold(folder, tmp_path):
    settings = Settings(detector=f"owlv2:{folder}")
    assert settings.recorded()["detector"] == f"owlv2 {fingerprint(str(folder))}"
    copied = tmp_path / "copy"
    copied.mkdir()
    for file in folder.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    assert fingerprint(str(copied)) == fingerprint(str(folder))
    weights = bytearray((copied / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copied / "model.safetensors").write_bytes(weights)
    assert fingerprint(str(copied)) != fingerprint(str(folder))


def test_a_folder_without_a_model_is_an_error_that_says_what_is_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a local folder with an OWLv2 model"):
        Settings(detector=f"owlv2:{tmp_path}").recorded()
