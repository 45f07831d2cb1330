"""`siglip2 inspect` from the outside: what it prints, its JSON and its page."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_up import drawing, encoded, seeded, sentence, write_shard

from siglip2.cli.main import main
from siglip2.core.data.source import open_source
from siglip2.core.data.text import Tokenizer
from siglip2.core.report.markup import VOID
from siglip2.emoji_world.plan import WorldOptions
from siglip2.emoji_world.write import write_world

HOSTILE = '[bold]\x1b[2J</style></script><script>alert(1)</script><img src=x onerror="alert(1)">\'& \ud800'


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small emoji world of which every fifth training sample repeats an earlier one."""
    folder = tmp_path_factory.mktemp("world")
    options = WorldOptions(
        scenes=60, singles=60, num_emoji=12, unseen=2, val=10, size=48, languages=("en", "ru"), duplicates=0.2
    )
    write_world(folder, options)
    return folder / "train"


@pytest.fixture
def inspected(tmp_path, capsys):
    """Runs the command and returns its JSON, its page and what it printed."""

    def run(*arguments, number=0):
        paths = [tmp_path / f"{number}.json", tmp_path / f"{number}.html"]
        main(["inspect", *map(str, arguments), "--json", str(paths[0]), "--html", str(paths[1])])
        return json.loads(paths[0].read_text("utf-8")), paths[1].read_text("utf-8"), capsys.readouterr().out

    return run


class Page(HTMLParser):
    """The page taken apart; checks that tags close."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], set(), set(), ""
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_numbers_of_a_world_are_those_of_its_samples(world, inspected, toy_tokenizer):
    found, page, printed = inspected(world, "--fields", "caption=json.captions", "--tokenizer", toy_tokenizer)
    source = open_source(str(world))
    records = [json.loads(source.read(i).record["json"]) for i in range(len(source))]
    assert found["format"] == 1
    assert found["samples"] == len(records) == 120
    assert found["unusable"] == 0
    captions = found["captions"]
    assert {row["language"]: row["captions"] for row in captions["languages"]} == {"en": 120, "ru": 120}
    assert {row["language"]: row["scripts"] for row in captions["languages"]} == {
        "en": {"Latin": 120}, "ru": {"Cyrillic": 120},
    }  # fmt: skip
    texts = [text for record in records for text in record["captions"].values()]
    assert captions["characters"]["mean"] == pytest.approx(sum(map(len, texts)) / len(texts))
    tokenizer = Tokenizer.load(toy_tokenizer)
    lengths = [len(tokenizer.ids(text)) for text in texts]
    assert captions["tokens"]["max"] == max(lengths)
    assert captions["cut"] == pytest.approx(sum(length > 63 for length in lengths) / len(lengths))
    assert found["boxes"]["count"] == sum(len(record["regions"]) for record in records)
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for record in records for b in [r["box"] for r in record["regions"]]]
    assert found["boxes"]["area"]["mean"] == pytest.approx(sum(areas) / len(areas))
    pictures = found["pictures"]
    assert pictures["width"]["mean"] == pytest.approx(sum(r["width"] for r in records) / 120)
    assert sum(pictures["ratio"]["counts"]) == 120
    assert pictures["exact"]["extra"] == sum("duplicate_of" in record for record in records) == 24
    for told in (page, printed):
        assert "120" in told


def test_labels_and_groups_are_counted_where_they_are(world, inspected):
    found, _, _ = inspected(world, "--fields", "caption=json.captions", "label=json.label", "--group-by", "json.kind")
    fields = {row["name"]: row for row in found["fields"]}
    source = open_source(str(world))
    labelled = sum("label" in json.loads(source.read(i).record["json"]) for i in range(len(source)))
    assert 0 < labelled < 120
    assert fields["label"]["present"] == labelled
    assert fields["label"]["share"] == pytest.approx(labelled / 120)
    assert sorted(row["name"] for row in found["groups"]["groups"]) == ["scene", "single"]
    assert all(row["reason"] for row in found["groups"]["groups"])  # too few, and too short


def test_two_workers_and_a_second_run_write_the_same_bytes(world, tmp_path):
    written = []
    for number, workers in enumerate((1, 2, 1)):
        path = tmp_path / f"{number}.json"
        html = path.with_suffix(".html")
        options = ["--fields", "caption=json.captions", "--limit", "50", "--sample", "3"]
        main(["inspect", str(world), *options, "--workers", str(workers), "--json", str(path), "--html", str(html)])
        written.append((path.read_bytes(), html.read_bytes()))
    assert written[0] == written[1] == written[2]
    assert json.loads(written[0][0])["samples"] == 50


@pytest.fixture
def damaged(tmp_path):
    """A shard with a hostile caption, a copied one, a cut picture and a missing one."""
    rng, good = seeded(0), encoded(drawing(0))
    samples = [(f"{i:03d}", {"jpg": encoded(drawing(i)), "txt": sentence(rng, 8)}) for i in range(20)]
    samples += [
        ("hostile", {"jpg": encoded(drawing(50)), "json": {"caption": HOSTILE, "regions": [{"box": "x"}]}}),
        ("echo", {"jpg": encoded(drawing(51)), "json": {"caption": HOSTILE}}),
        ("cut", {"jpg": good[: len(good) // 2], "txt": "half of one"}),
        ("bare", {"txt": "no picture at all"}),
    ]
    return write_shard(tmp_path / "damaged.tar", samples)


def test_damaged_samples_are_counted_and_named(damaged, inspected):
    found, page, printed = inspected(damaged)
    assert found["unusable"] == 1
    (reason,) = found["reasons"]
    assert (reason["field"], reason["kind"], reason["count"]) == ("image", "the image cannot be decoded", 1)
    assert reason["examples"][0].startswith(f"{damaged}: cut: ")
    fields = {row["name"]: row for row in found["fields"]}
    assert (fields["image"]["present"], fields["image"]["unusable"]) == (23, 1)
    assert found["notes"][0]["kind"] == "bad box"
    assert found["pictures"]["count"] == 22
    for told in (page, printed):
        assert "cannot be decoded" in told


def test_a_hostile_caption_is_text_on_the_page_and_on_the_terminal(damaged, inspected):
    found, page, printed = inspected(damaged)
    assert found["captions"]["exact"]["clusters"] == 1
    seen = Page(page)
    assert "<script>alert(1)</script><img src=x" in seen.text
    assert not {"script", "img"} & seen.tags
    assert not {name for name in seen.attributes if name.startswith("on")}
    assert not re.search(r"https?://|url\(|@import", page)
    assert "[bold]" in printed
    assert "\x1b[2J" not in printed


def test_human_and_machine_sets_are_compared_and_the_page_says_it_is_a_hint(tmp_path, inspected):
    rng, picture = seeded(1), encoded(drawing(0, size=(16, 16)))
    formula = "this is a photo showing a {} and a {} near a {} in the background of the {}"
    made = {
        "people": lambda: sentence(rng, rng.randrange(32, 40), 40),
        "machine": lambda: " . ".join(formula.format(*sentence(rng, 4, 40).split()) for _ in range(2)),
    }
    paths = {
        name: write_shard(tmp_path / f"{name}.tar", [(f"{i:04d}", {"jpg": picture, "txt": make()}) for i in range(700)])
        for name, make in made.items()
    }
    options = ("--group-by", "source", "--human", paths["people"], "--headers-only")
    found, page, printed = inspected(*paths.values(), *options)
    assert found["groups"]["flagged"] == [str(paths["machine"])]
    (compared,) = found["groups"]["comparisons"]
    assert sum(compared["lengths"].values()) == compared["captions"] >= 200
    assert set(compared["outside"]) & {"hurst", "joseph", "self_similarity"}
    for estimate in compared["group_estimates"].values():
        assert estimate["value"] is None or estimate["low"] <= estimate["value"] <= estimate["high"]
    for told in (page, printed):
        assert "never a verdict" in " ".join(told.split())
    assert found["pictures"]["near"] is None
    assert found["pictures"]["exact"]["extra"] == 1399


def test_tables_and_folders_are_inspected_too(tmp_path, inspected):
    for i in range(3):
        (tmp_path / "set" / "cat").mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / "cat" / f"{i}.png").write_bytes(encoded(drawing(i), "PNG"))
    (tmp_path / "set" / "cat" / "0.txt").write_text("a cat", "utf-8")
    folder, _, _ = inspected(tmp_path / "set")
    assert (folder["samples"], folder["captions"]["count"], folder["pictures"]["formats"]) == (3, 1, {"PNG": 3})
    (tmp_path / "table.csv").write_text("filepath,title\nset/cat/0.png,first\nset/cat/9.png,gone\n", "utf-8")
    table, _, _ = inspected(tmp_path / "table.csv", number=1)
    assert (table["samples"], table["unusable"]) == (2, 1)
    assert table["reasons"][0]["field"] == "sample"
    assert {row["name"]: row["share"] for row in table["fields"]}["caption"] == 1.0  # of what could be read


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sample", "1"], "give --limit too"),
        (["--limit", "0"], "at least 1 sample"),
        (["--workers", "0"], "at least 1"),
        (["--fields", "caption"], "NAME=SPEC"),
        (["--fields", "max_pixels=3"], "cannot be the name of a field"),
        (["--human", "nobody"], "no group 'nobody'"),
        (["--html", "/nowhere/page.html"], "no folder /nowhere"),
        (["--scorer", "/nowhere"], "causal language model"),
    ],
)
def test_a_wrong_option_is_an_error_with_a_next_move(toy_shards, capsys, options, message):
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", str(toy_shards), *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_what_is_asked_for_and_in_no_sample_is_warned_of(world, inspected):
    asked = ("--fields", "caption=nothere", "label=json.label", "--group-by", "nothing", "--headers-only")
    found, page, printed = inspected(world, *asked)
    assert len(found["warnings"]) == 2
    for told in (page, printed, " ".join(found["warnings"])):
        told = " ".join(told.split())
        assert "none of the 120 samples read has the field caption=nothere" in told
        assert "none of the 120 samples read has a text or a number under nothing to group by" in told
        assert "the field label=" not in told


def test_what_some_sample_has_or_nobody_asked_for_is_not_warned_of(world, inspected):
    found, page, printed = inspected(world, "--fields", "label=json.label", "--group-by", "json.kind", "--headers-only")
    assert found["captions"]["count"] == 0
    assert found["warnings"] == []
    assert "warning" not in (page + printed).lower()


def test_pictures_without_captions_are_inspected(tmp_path, inspected):
    shard = write_shard(tmp_path / "pictures.tar", [(f"{i}", {"jpg": encoded(drawing(i))}) for i in range(4)])
    found, page, printed = inspected(shard)
    assert (found["samples"], found["captions"]["count"], found["pictures"]["count"]) == (4, 0, 4)
    assert found["captions"]["tokens"] is None
    assert found["groups"]["groups"] == []
    assert "No fractal statistics" in printed
    assert "Languages" not in Page(page).text


def test_keys_of_the_json_are_those_that_the_documentation_names(world, inspected):
    found, _, _ = inspected(world, "--fields", "caption=json.captions")
    table = (Path(__file__).parents[2] / "docs" / "inspect.md").read_text("utf-8").partition("## The JSON")[2]
    named = dict(re.findall(r"^\| `(captions|pictures|boxes|groups)` \| (.*) \|$", table, flags=re.M))
    for key, names in named.items():
        assert re.findall(r"`(\w+)`", names) == list(found[key])
    assert {"format", *re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`.*?) \|", table, flags=re.M)))} == set(found)
    spread = re.findall(r"`(\w+)`", table.partition("A spread")[2].partition(". Copies")[0])
    assert spread == list(found["captions"]["words"])
    assert re.findall(r"`(\w+)`", table.partition("Copies have")[2]) == list(found["captions"]["exact"])
