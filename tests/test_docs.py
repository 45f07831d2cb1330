"""The documents tell the truth: their Python runs, their recipes and commands exist, their quotes are the code's words.

Code blocks say what they are: ```python, ```yaml, ```bash, ```toml, ```text. Python blocks run in order and in one
namespace per document; a block marked ```python no-run does not, and ```yaml no-run is not read as a recipe.
"""

import ast
import importlib
import inspect
import re
import shlex
import sys
import tomllib
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import yaml

import siglip2
from siglip2.cli.main import COMMANDS, TRAINING
from siglip2.core.hooks import PROJECT, RUN_SPECS, CatalogueSpecs
from siglip2.core.plugin import Plugin
from siglip2.recipes import expand_arguments, find_recipe
from siglip2.testing import Case, checks_for
from siglip2.testing.contract import check_documented, check_registered

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
KOLEO = ROOT / "examples" / "siglip2-koleo"
PLUGINS = ROOT / "docs" / "plugins.md"
FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,})(?P<info>[^\n`]*)\n(?P<body>.*?)^ *(?P=fence) *$", re.M | re.S)
RECIPE_KEYS = {"seed_everything", "plugins", "model", "data", "trainer", "ckpt_path", "report"}
SHELLS = ("bash", "sh", "shell", "console")


def name_of(path):
    return str(path.relative_to(ROOT))


def blocks(path, *languages):
    """The (line number, body) of every code block of a document in one of the languages, `no-run` ones left out."""
    text = path.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        words = match["info"].split()
        if words[:1] and words[0] in languages and "no-run" not in words:
            body = re.sub(f"^{match['indent']}", "", match["body"], flags=re.M)
            found.append((text[: match.start()].count("\n") + 2, body))
    return found


def without_code(path):
    return FENCE.sub("", path.read_text(encoding="utf-8"))


def run_blocks(path):
    """Runs the Python blocks of a document as one module and returns it."""
    module = ModuleType(f"blocks_of_{path.stem.lower()}")
    sys.modules[module.__name__] = module  # so that its views can be pickled
    for line, body in blocks(path, "python"):
        code = compile("\n" * (line - 1) + body, str(path), "exec")
        exec(code, module.__dict__)
    return module


@pytest.fixture(scope="module")
def plugins_page():
    """docs/plugins.md as a module: its Python blocks have run."""
    module = run_blocks(PLUGINS)
    yield module
    del sys.modules[module.__name__]


@pytest.fixture
def described(plugins_page, third_party_plugins, monkeypatch):
    """The plugins that the documents speak of are installed: that of docs/plugins.md and the example package."""
    monkeypatch.syspath_prepend(KOLEO)
    loads = {"uniformity": lambda: plugins_page, "koleo": lambda: importlib.import_module("siglip2_koleo")}
    for name, load in loads.items():
        dist = SimpleNamespace(name=f"siglip2-{name}", version="0")
        third_party_plugins.append(SimpleNamespace(name=name, value=name, dist=dist, load=load))


def cases(*languages, paths=DOCUMENTS):
    return [pytest.param(body, id=f"{name_of(p)}:{line}") for p in paths for line, body in blocks(p, *languages)]


# Python


def test_python_of_the_plugin_page_runs(plugins_page):
    assert issubclass(plugins_page.Uniformity, Plugin)


@pytest.mark.parametrize("path", [p for p in DOCUMENTS if p != PLUGINS and blocks(p, "python")], ids=name_of)
def test_python_of_document_runs(path):
    del sys.modules[run_blocks(path).__name__]


def examples():
    """The names of the plugin classes that docs/plugins.md defines."""
    trees = [ast.parse(body) for _, body in blocks(PLUGINS, "python")]
    classes = [node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
    return [
        c.name for c in classes if any(isinstance(b, ast.Name) and b.id in ("Plugin", "Objective") for b in c.bases)
    ]


@pytest.mark.parametrize("name", examples())
def test_example_plugin_keeps_the_contract(name, plugins_page):
    case = Case(getattr(plugins_page, name))
    for check in checks_for(case.cls):
        if check not in (check_registered, check_documented):  # only the first example is a whole package
            check(case)


def test_first_example_is_registered_and_documented(plugins_page, described):
    check_registered(Case(plugins_page.Uniformity))
    check_documented(Case(plugins_page.Uniformity))


# Hooks


def signature(spec, hook):
    """A hook as the page writes it; forward references without their quotes."""
    return f"{hook}{inspect.signature(vars(spec)[hook])}".replace("'", "")


def specified():
    return {h: signature(s, h) for s in (CatalogueSpecs, *RUN_SPECS) for h in vars(s) if not h.startswith("_")}


def test_plugin_page_has_the_exact_signature_of_every_hook_and_no_other():
    section = PLUGINS.read_text(encoding="utf-8").partition("\n## Hooks\n")[2].partition("\n## ")[0]
    written = dict(re.findall(r"^### (\w+)\n\n`([^`\n]+)`\n", section, flags=re.M))
    assert written == specified()
    assert list(written) == list(specified())
    assert set(re.findall(r"^### (\w+)", section, flags=re.M)) == set(written)


def test_plugin_page_names_everything_an_author_can_import():
    text = PLUGINS.read_text(encoding="utf-8")
    private = {"ImageView", "TextView"}  # the page speaks of their instances, IMAGE and CAPTION
    assert [name for name in siglip2.__all__ if name not in private and not re.search(rf"\b{name}\b", text)] == []


# Recipes and packages


@pytest.mark.parametrize("body", cases("yaml"))
def test_yaml_block_is_a_recipe_whose_names_exist(body, tmp_path, described):
    recipe = yaml.safe_load(body)
    assert set(recipe) <= RECIPE_KEYS
    path = tmp_path / "recipe.yaml"
    path.write_text(body, encoding="utf-8")
    expand_arguments(["--config", str(path)])


@pytest.mark.parametrize("body", cases("toml"))
def test_toml_block_declares_the_entry_point_group(body):
    assert PROJECT in tomllib.loads(body)["project"]["entry-points"]


# Commands


def commands(body):
    """The commands of a shell block as lists of words: continued lines joined, prompts and `VAR=x` taken off."""
    for line in body.replace("\\\n", " ").splitlines():
        command = []
        for word in [*_words(line), ";"]:
            if set(word) <= set("|&;"):
                yield command
                command = []
            elif command or not re.match(r"\w+=", word):
                command.append(word)


def _words(line):
    """The words of a shell line; of printed text, which may have a lone apostrophe, what stands between spaces."""
    lexer = shlex.shlex(line.strip().removeprefix("$ "), posix=True, punctuation_chars="|&;")
    lexer.whitespace_split = True
    lexer.commenters = "#"
    try:
        return list(lexer)
    except ValueError:
        return line.split()


def shell_commands(program):
    """Every call of `program` in the shell blocks of the documents, without the program itself."""
    return [
        pytest.param(command[1:], id=f"{name_of(path)}:{line}:{number}")
        for path in DOCUMENTS
        for line, body in blocks(path, *SHELLS)
        for number, command in enumerate(commands(body))
        if command and Path(command[0]).name == program
    ]


@pytest.mark.parametrize("words", shell_commands("siglip2"))
def test_command_exists_and_so_do_its_recipes_and_plugins(words, described):
    if words and words[0] in TRAINING:
        expand_arguments(_with_shipped_recipes(words[1:]))
    elif not words or not words[0].startswith("-"):
        assert any(tuple(words[: len(known)]) == known for known in COMMANDS), f"no command {words[:2]}"


def _with_shipped_recipes(words):
    """The words without recipes that are the reader's own: a path that ends in .yaml and is no file of ours."""
    kept, queue = [], list(words)
    while queue:
        word = queue.pop(0)
        flag, has_value, value = word.partition("=")
        if flag not in ("--config", "-c"):
            kept.append(word)
            continue
        value = value if has_value else queue.pop(0)
        ours = ROOT / value
        if ours.is_file() or value.startswith("configs/") or not value.endswith(".yaml"):
            kept += ["--config", str(ours if ours.is_file() else find_recipe(value))]
    return kept


def make_targets(path):
    text = "\n".join(body for _, body in blocks(path, *SHELLS))
    return set(re.findall(r"^(?:\$ )?make (\w+)", text, flags=re.M)) | set(
        re.findall(r"`make (\w+)", without_code(path))
    )


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_make_targets_exist(path):
    known = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.M))
    assert make_targets(path) <= known


# Links


def links(path):
    text = re.sub(r"`[^`\n]*`", "", without_code(path))
    found = re.findall(r"\]\(<?([^)\s>]+)>?[^)]*\)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    return [link for link in found if not re.match(r"[a-z]+:", link)]


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_relative_links_lead_to_files(path):
    lost = [link for link in links(path) if link[0] != "#" and not (path.parent / link.partition("#")[0]).exists()]
    assert lost == []


def anchors(path):
    """The anchors that GitHub gives the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", without_code(path), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_to_headings_lead_to_headings(path):
    pairs = [link.split("#") for link in links(path) if "#" in link]
    targets = [((path.parent / file) if file else path, anchor) for file, anchor in pairs]
    assert [t for t in targets if t[0].suffix == ".md" and t[1] not in anchors(t[0])] == []


def test_tree_of_the_architecture_page_is_that_of_the_package():
    """Every module has its line, and every line its module."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = text.partition("\n## Tree\n")[2].partition("\n## ")[0]
    written, folders = set(), []
    for indent, name in re.findall(r"^( *)([\w./-]+)", FENCE.search(section)["body"], flags=re.M):
        folders = [*folders[: len(indent) // 2], name]
        if name.endswith(".py"):
            written.add("".join(folders))
    package = {p.relative_to(ROOT).as_posix() for p in (ROOT / "siglip2").rglob("*.py")}
    assert {p for p in written if p.startswith("siglip2/")} == {p for p in package if not p.endswith("/__init__.py")}


# Quotes


@cache
def templates():
    """The strings that the package can write, as regular expressions: what is filled in may be anything."""
    found = []
    for path in sorted((ROOT / "siglip2").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp):
                pattern = _pattern(node)
                if len(pattern.replace(".*", "")) > 20:
                    found.append(re.compile(pattern, re.S))
    return found


def _pattern(node):
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return ".*".join(re.escape(part) for part in node.value.split("%s"))
    if isinstance(node, ast.JoinedStr):
        return "".join(_pattern(value) for value in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _pattern(node.left) + _pattern(node.right)
    return ".*"


@pytest.mark.parametrize("quote", cases("text", paths=[PLUGINS]))
def test_quoted_message_is_one_that_the_code_writes(quote):
    assert any(template.fullmatch(quote.strip()) for template in templates())
