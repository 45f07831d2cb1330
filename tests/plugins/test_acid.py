"""`acid` trains on the rows that the selection chose of what learner and reference say, and on nothing else."""

import json
import logging
from collections import Counter
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback
from parallel_ranks import fit, on_ranks

from siglip2 import CAPTION, IMAGE
from siglip2.cli.main import main
from siglip2.cli.training import SigLIP2CLI
from siglip2.core.checkpoint import read_checkpoint
from siglip2.core.data.fields import BadSample, Fields, Sample
from siglip2.core.data.train_tokenizer import train_tokenizer
from siglip2.core.model.sizes import ShapeOptions
from siglip2.core.reference import SquareView
from siglip2.core.selection import Draw, Embedded, draw_jointly, gumbel_noise
from siglip2.plugins.acid import ACID, FieldView
from siglip2.plugins.fixed import Fixed
from siglip2.plugins.naflex import NaFlex
from siglip2.plugins.navit import NaViT
from siglip2.plugins.sigmoid import Sigmoid
from siglip2.recipes import load_recipe
from siglip2.registry import overlay, read_plugins
from siglip2.testing import TinyModule, fake_batch, rehearse, tiny_module, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start")  # the reference is, on purpose

SMALL = {"n_chunks": 2, "groups": 2}
HARD = {**SMALL, "score": "hard_learner"}


def module_with(*, batch_size=8, **options):
    """A recipe of sigmoid and acid for pictures of 32 pixels."""
    return tiny_module([Fixed(image_size=32, patch_size=16, batch_size=batch_size), Sigmoid(), ACID(**options)])


def saved(folder, module, **model):
    """A checkpoint of a module, as far as a reference reads it."""
    ours = {"recipe": {"model": {"size": "tiny/16", **model}}, "text": module.tokenizer.to_state()}
    path = folder / "reference.ckpt"
    torch.save({"state_dict": module.state_dict(), "siglip2": {**ours, "pixels": module.patchifier.contract()}}, path)
    return str(path)


@pytest.fixture
def teacher():
    """The model that is the reference: of another resolution and temperature."""
    return TinyModule([Fixed(image_size=48, batch_size=8)], tiny_tokenizer(), size="tiny/16", logit_scale=1.0)


@pytest.fixture
def reference(teacher, tmp_path):
    return saved(tmp_path, teacher)


def kept_of(module, batch=None):
    step = module.make_step(module.fake_batch(batch_size=8) if batch is None else batch, 0.0)
    return module.curate(step), step


@torch.no_grad()
def embedded(towers, batch, view="image"):
    image, text = towers.encode_image(batch.views[view]), towers.encode_text(batch.views["caption"])
    return Embedded(image.embedding, text.embedding, towers.logit_scale, towers.logit_bias)


def test_rows_are_drawn_by_what_learner_and_reference_say_each_of_its_own_images(teacher, reference):
    module = module_with(reference=reference, **SMALL, seed=5)
    kept, _ = kept_of(module)
    learner = embedded(module.model, fake_batch(batch_size=8, patchifier=module.patchifier))
    other = embedded(teacher.model, fake_batch(batch_size=8, patchifier=teacher.patchifier))
    wanted = draw_jointly(
        [(1.0, learner), (-1.0, other)], gumbel_noise(5, 0, chunks=2, rows=8), Draw(groups=2, chunks=2, per_group=1)
    )
    assert kept.tolist() == wanted.rows_b.tolist()


def test_easy_reference_does_not_ask_the_learner(teacher, reference):
    module = module_with(reference=reference, score="easy_reference", **SMALL)
    asked = []
    module.model.vision.register_forward_hook(lambda *_: asked.append(1))
    kept, _ = kept_of(module)
    other = embedded(teacher.model, fake_batch(batch_size=8, patchifier=teacher.patchifier))
    wanted = draw_jointly([(-1.0, other)], gumbel_noise(0, 0, chunks=2, rows=8), Draw(2, 2, 1))
    assert kept.tolist() == wanted.rows_b.tolist()
    assert not asked


def test_independent_takes_the_largest_losses_of_each_group():
    module = module_with(score="hard_learner", method="independent", groups=2)
    kept, _ = kept_of(module)
    z = embedded(module.model, fake_batch(batch_size=8, patchifier=module.patchifier))
    similarity = (z.image_mD * z.text_mD).sum(1).double()  # the smaller, the larger is the loss
    best = [sorted(range(first, first + 4), key=lambda k: similarity[k])[:2] for first in (0, 4)]
    assert kept.tolist() == [row for group in best for row in group]


def test_control_needs_no_reference_runs_no_network_and_keeps_every_row_as_often():
    module = module_with(method="random", reference="???", groups=1, filter_ratio=0.75)
    for network in (module.model.vision, module.model.text):
        network.register_forward_hook(lambda *_: pytest.fail("a network ran"))
    batch = module.fake_batch(batch_size=8)
    count = Counter()
    for index in range(800):
        kept, _ = kept_of(module, replace(batch, index=index))
        assert len(set(kept.tolist())) == 2
        count.update(kept.tolist())
    assert all(abs(count[row] - 200) < 60 for row in range(8)), count  # 5 standard deviations


def test_objectives_are_trained_on_the_kept_rows_alone():
    module = module_with(**HARD)
    batch = module.fake_batch(batch_size=8)
    kept, _ = kept_of(module)
    assert len(kept) == 4
    plain = tiny_module([Fixed(image_size=32, patch_size=16, batch_size=4), Sigmoid()])
    plain.load_state_dict(module.state_dict())
    assert module(batch, 0.0)["sigmoid"].item() == plain(batch.select(kept), 0.0)["sigmoid"].item()


def test_gradients_reach_the_towers_under_autocast():
    """Autocast keeps casts of the weights, and those of the scoring have no gradient."""
    module = module_with(**HARD)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = module(module.fake_batch(batch_size=8), 0.0)["sigmoid"]
    loss.backward()
    assert [name for name, p in module.model.named_parameters() if p.grad is None] == []


def test_draw_depends_on_seed_and_number_of_the_batch_alone():
    module, other = module_with(**HARD), module_with(**HARD, seed=1)
    batch = module.fake_batch(batch_size=8)
    rows = [kept_of(module, replace(batch, index=index))[0].tolist() for index in range(6)]
    assert len(set(map(tuple, rows))) > 2
    torch.rand(3)
    assert rows == [kept_of(module, replace(batch, index=index))[0].tolist() for index in range(6)]
    assert rows != [kept_of(other, replace(batch, index=index))[0].tolist() for index in range(6)]


def test_watched_fields_and_scores_are_logged_over_all_and_over_kept_rows():
    module = module_with(**HARD, watch=["label"])
    kept, step = kept_of(module)
    labels = torch.arange(8.0)  # of the tiny source
    z = embedded(module.model, step.batch)
    losses = -torch.nn.functional.logsigmoid(z.scale.exp() * (z.image_mD * z.text_mD).sum(1) + z.bias)
    wanted = {"all_label": labels.mean(), "kept_label": labels[kept].mean()}
    wanted |= {"score": losses.mean(), "kept_score": losses[kept].mean()}
    logged = {name.removeprefix("acid/"): value.item() for name, value in step.scalars.items()}
    assert 0 < logged.pop("entropy") <= 1
    assert logged == pytest.approx({name: value.item() for name, value in wanted.items()}, rel=1e-5)


def test_watched_field_that_is_no_number_makes_a_bad_sample_and_one_that_is_absent_is_zero():
    fields = Fields(extra={"noise": "json.noise"})
    made = {}
    for noise in (True, 0.25, None, "much"):
        sample = Sample("k", "here", {"json": json.dumps({"noise": noise}).encode()}, fields)
        try:
            made[noise] = FieldView("acid_noise", "noise")(sample, None)
        except BadSample as bad:
            made[noise] = str(bad)
    assert [made[noise].tolist() for noise in (True, 0.25, None)] == [[1.0], [0.25], [0.0]]
    assert "noise should be a number, found 'much'" in made["much"]


@pytest.mark.parametrize("score_rows", [1, 3, 8])
def test_scoring_in_parts_keeps_the_same_rows(reference, score_rows):
    wanted, _ = kept_of(module_with(reference=reference, **SMALL))
    module = module_with(reference=reference, **SMALL, score_rows=score_rows)
    seen = []
    module.model.vision.register_forward_hook(lambda _, images, out: seen.append(images[0].num_images))
    kept, _ = kept_of(module)
    assert kept.tolist() == wanted.tolist()
    assert max(seen) == score_rows
    assert sum(seen) == 8


# Images that are scored


def views_of(plugin):
    return {view.name: view for view in plugin.views()}


def test_reference_with_the_pixels_of_the_run_reads_the_images_of_the_run(tmp_path):
    path = saved(tmp_path, TinyModule([Fixed(image_size=32, batch_size=64)], tiny_tokenizer(), size="tiny/16"))
    assert views_of(module_with(reference=path, **SMALL).plugins["acid"]) == {"image": IMAGE, "caption": CAPTION}


def test_reference_with_other_pixels_has_a_view_of_its_own(reference):
    views = views_of(module_with(reference=reference, **SMALL).plugins["acid"])
    assert views["acid_reference"] == SquareView("acid_reference", 48, 16, "bilinear", antialias=True)
    assert views.keys() == {"image", "acid_reference", "caption"}


def test_fixed_reference_scores_a_run_with_native_images(reference):
    module = tiny_module(
        [NaFlex(seq_lens=[4, 9], batch_size=8, table=3), Sigmoid(), ACID(reference=reference, **SMALL)]
    )
    kept, step = kept_of(module)
    assert len(set(kept.tolist())) == 4
    assert step.view("acid_reference").grid == (3, 3)


def test_small_images_are_scored_by_learner_and_reference(reference):
    module = module_with(reference=reference, **SMALL, scoring_tokens=1)
    acid = module.plugins["acid"]
    lengths = {"learner": [], "reference": []}
    for name, vision in (("learner", module.model.vision), ("reference", acid.reference.towers.vision)):
        vision.register_forward_hook(lambda _, images, out, n=name: lengths[n].append(images[0].patches.shape[1]))
    views = views_of(acid)
    assert views == {"acid_image": SquareView("acid_image", 16, 16, "bilinear", antialias=True), "caption": CAPTION}
    module(module.fake_batch(batch_size=8), 0.0)
    assert lengths == {"learner": [1, 4], "reference": [1]}  # scored, and then trained on


def test_reference_of_another_patch_size_reads_small_images_of_its_own(tmp_path):
    narrow = {"width": 64, "depth": 1, "mlp_dim": 64, "num_heads": 2}
    shapes = {"vision": ShapeOptions(**narrow), "text": ShapeOptions(**narrow)}
    teacher = TinyModule([Fixed(image_size=64, patch_size=32, batch_size=8)], tiny_tokenizer(), size="B/32", **shapes)
    path = saved(tmp_path, teacher, size="B/32", vision=narrow, text=narrow)
    module = module_with(reference=path, **SMALL, scoring_tokens=1)
    views = views_of(module.plugins["acid"])
    assert (views["acid_image"].side, views["acid_reference"].side) == (16, 32)
    assert len(kept_of(module)[0]) == 4


def test_native_images_are_scored_at_any_length():
    module = tiny_module([NaFlex(seq_lens=[4, 9], batch_size=8, table=3), Sigmoid(), ACID(**HARD, scoring_tokens=2)])
    _, step = kept_of(module)
    assert step.view("acid_image").patches.shape[1] == 2


# Before the first step


@pytest.mark.parametrize("filter_ratio", [0.5, 0.75])
def test_rehearsal_of_two_samples_keeps_one_whatever_the_super_batch(filter_ratio):
    sizes = []

    class Watching(Sigmoid):
        def loss(self, step):
            sizes.append(step.batch.size)
            return super().loss(step)

    large = Fixed(image_size=32, patch_size=16, batch_size=65536)
    rehearse([large, Watching(), ACID(score="hard_learner", filter_ratio=filter_ratio)])
    assert sizes == [1]


BAD = {
    "filter_ratio is the share that is dropped, in .0, 1., found 1": {"filter_ratio": 1.0},
    "filter_ratio is the share that is dropped, in .0, 1., found 0": {"filter_ratio": 0.0},
    "score is 'easy', expected one of learnability, easy_reference, hard_learner": {"score": "easy"},
    "method is 'jest', expected one of joint, independent, random": {"method": "jest"},
    "first is 'random', expected one of diagonal, uniform": {"first": "random"},
    "at least 1 of each, found .'n_chunks': 0, 'score_rows': -1": {"n_chunks": 0, "score_rows": -1},
    "positive gain and a seed of at least 0, found gain=-1": {"gain": -1.0},
    "positive gain and a seed of at least 0, found gain=nan": {"gain": float("nan")},
}


@pytest.mark.parametrize(("message", "options"), BAD.items(), ids=[str(options) for options in BAD.values()])
def test_option_out_of_its_range_is_named(message, options):
    with pytest.raises(ValueError, match=f"acid: .*{message}"):
        ACID(**options)


NOT_DIVIDING = [  # super-batch, filter_ratio, n_chunks, groups, what is left, super-batches that work
    pytest.param(100, 0.5, 16, 8, "50 rows", [256], id="too few for chunks and groups"),
    pytest.param(600, 0.5, 16, 8, "300 rows", [512, 768], id="chunks and groups"),
    pytest.param(10, 0.75, 1, 1, "2.5 rows", [8, 12], id="half a row"),
    pytest.param(64, 0.8, 2, 2, "12.8 rows", [60, 80], id="a share that is no power of two"),
    pytest.param(10, 0.6, 1, 4, "4 rows", [20], id="groups of the super-batch"),
]


@pytest.mark.parametrize(("batch_size", "filter_ratio", "n_chunks", "groups", "left", "near"), NOT_DIVIDING)
def test_super_batch_that_does_not_divide_is_told_the_next_that_do(
    batch_size, filter_ratio, n_chunks, groups, left, near
):
    options = {"score": "hard_learner", "filter_ratio": filter_ratio, "n_chunks": n_chunks, "groups": groups}
    sizes = " or ".join(map(str, near))
    message = (
        f"super-batch of {batch_size} .* leaves {left}, .* {n_chunks} chunks of {groups} groups: .* to {sizes}, or"
    )
    with pytest.raises(ValueError, match=message):
        module_with(batch_size=batch_size, **options)
    for size in near:
        module_with(batch_size=size, **options)


def test_every_layout_of_a_recipe_has_to_divide():
    lengths = NaFlex(seq_lens=[4, 9], batch_size=8, batch_sizes={9: 6}, table=3)
    with pytest.raises(ValueError, match=r"super-batch of 6 \(those of 9 patches\)"):
        tiny_module([lengths, Sigmoid(), ACID(**HARD)])


def test_groups_that_do_not_divide_over_the_devices_are_refused_in_the_rehearsal(monkeypatch):
    monkeypatch.setattr("siglip2.plugins.acid.world_size", lambda: 3)
    with pytest.raises(ValueError, match="acid: 8 groups do not divide over 3 devices: set groups to 6 or 9"):
        rehearse([Fixed(image_size=32, batch_size=256), Sigmoid(), ACID(score="hard_learner")])


@pytest.mark.parametrize("path", [None, "???"])
def test_score_that_needs_a_reference_says_so(path):
    with pytest.raises(
        ValueError, match="the score 'learnability' needs a reference: .* --plugins.acid.reference PATH"
    ):
        module_with(reference=path, **SMALL)


def test_wrong_path_and_other_vocabulary_are_refused(reference, tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at nowhere.ckpt"):
        module_with(reference="nowhere.ckpt", **SMALL)
    file = train_tokenizer(["other words", "than those"], vocab_size=320, out=tmp_path / "tokenizer.json")
    other = type(tiny_tokenizer()).load(file, length=16)
    with pytest.raises(ValueError, match=r"reference .* reads other texts than this run: tokenizer file: sha256"):
        TinyModule([Fixed(image_size=32, batch_size=8), ACID(reference=reference, **SMALL)], other, size="tiny/16")


def test_rows_that_images_share_are_not_scored_in_parts():
    with pytest.raises(ValueError, match="score_rows cannot cut rows that images share"):
        tiny_module([NaViT(batch_size=8, group=4), Sigmoid(), ACID(**HARD, score_rows=2)])


def test_network_of_one_size_does_not_score_small_images():
    plugins = [Fixed(image_size=32, batch_size=8), Sigmoid(), ACID(**HARD, scoring_tokens=1)]
    with pytest.raises(ValueError, match="model.timm is a network of timm.*leave scoring_tokens out"):
        TinyModule(plugins, tiny_tokenizer(), timm="vit_tiny_patch16_224")


# Whole runs


class Diary(Callback):
    """Notes keys, losses and what else was logged in every step, and the gradients of the first."""

    def __init__(self):
        self.steps, self.gradients = {}, {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == 0:
            self.gradients = {n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        logged = {name: value.item() for name, value in trainer.callback_metrics.items()}
        self.steps[trainer.global_step] = {"keys": batch.keys, **logged}


def run(arguments, *extra):
    cli, diary = SigLIP2CLI([*arguments, *map(str, extra)], command="fit"), Diary()
    cli.trainer.callbacks.append(diary)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=cli.resume_from())
    return diary, {name: tensor.clone() for name, tensor in cli.model.state_dict().items()}, cli


@pytest.fixture
def curated(tiny_recipe, tmp_path):
    """Arguments of ten curated steps, whose reference read other images in a run of its own."""
    there = ["--trainer.default_root_dir", tmp_path / "teacher", "--plugins.fixed.image_size", 48]
    run(tiny_recipe, *there, "--trainer.max_steps", 5, "--seed_everything", 1)
    path = tmp_path / "teacher" / "step=5.ckpt"
    options = {"reference": str(path), **SMALL, "watch": ["label"]}
    overlay = tmp_path / "acid.yaml"
    overlay.write_text(json.dumps({"plugins": [{"fixed": {"batch_size": 8}}, {"acid": options}]}))
    return [*tiny_recipe, "--config", str(overlay)]


def test_curated_run_resumes_bitwise_whatever_the_workers_without_its_reference_in_the_file(curated, tmp_path, caplog):
    whole, weights, cli = run(curated)
    assert whole.steps[10]["train/acid/kept_label"] >= 0
    path = tmp_path / "step=5.ckpt"
    file = read_checkpoint(str(path))
    assert not [name for name in file["state_dict"] if name.startswith("plugins.")]
    names = {name for group in file["optimizer_states"][0]["param_groups"] for name in group["param_names"]}
    assert names
    assert not [name for name in names if name.startswith("plugins.")]
    assert not any(module.training for module in cli.model.plugins["acid"].reference.modules())
    with caplog.at_level(logging.WARNING):
        logging.getLogger().addHandler(caplog.handler)
        resumed, resumed_weights, _ = run(curated, "--ckpt_path", path, "--data.num_workers", 2)
    assert resumed.steps == {step: seen for step, seen in whole.steps.items() if step > 5}
    assert all(torch.equal(weights[name], resumed_weights[name]) for name in weights)
    assert "acid" not in caplog.text  # it neither starts fresh nor is dropped


def test_run_in_parts_keeps_the_rows_and_the_losses_of_the_whole(curated):
    whole, _, _ = run(curated, "--trainer.max_steps", 3)
    split, _, _ = run(curated, "--trainer.max_steps", 3, "--model.accumulate", 2)
    for step, seen in whole.steps.items():
        assert split.steps[step]["train/sigmoid"] == pytest.approx(seen["train/sigmoid"], rel=1e-5)
    assert split.gradients.keys() == whole.gradients.keys()
    for name, gradient in whole.gradients.items():
        torch.testing.assert_close(split.gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.fixture
def cached(curated, tmp_path):
    """The same recipe with what `siglip2 embed` wrote by the reference, which is gone."""
    reference, shards = tmp_path / "teacher" / "step=5.ckpt", curated[curated.index("--data.train.path") + 1]
    place = [str(shards), "--field", "caption=json.caption", "--name", "teacher", "--out", str(tmp_path / "embedded")]
    exact = ["--precision", "fp32", "--compute", "fp32", "--accelerator", "cpu", "--num-workers", "0"]
    main(["embed", str(reference), *place, *exact])
    reference.unlink()
    return [*curated, "--plugins.acid.reference", "null", "--plugins.acid.cached", str(tmp_path / "embedded/teacher")]


def test_cached_embeddings_keep_the_rows_that_the_reference_keeps(curated, request):
    asked, _, _ = run(curated, "--trainer.max_steps", 4)
    read, _, cli = run(request.getfixturevalue("cached"), "--trainer.max_steps", 4)
    assert cli.model.plugins["acid"].reference is None
    for step, seen in asked.steps.items():
        assert read.steps[step]["train/acid/kept_label"] == seen["train/acid/kept_label"]
        assert read.steps[step]["train/sigmoid"] == pytest.approx(seen["train/sigmoid"], rel=1e-6)
        assert read.steps[step]["train/acid/score"] == pytest.approx(seen["train/acid/score"], rel=1e-4)


def test_stale_or_missing_embeddings_are_an_error_before_the_first_step(cached, tmp_path):
    gone = sorted((tmp_path / "embedded").glob("*.safetensors"))[-1]
    gone.unlink()
    with pytest.raises(ValueError, match=r"the embeddings 'teacher' do not fit (.|\n)*no embeddings at"):
        run(cached)
    with pytest.raises(ValueError, match="are both set"):
        ACID(reference="a.ckpt", cached="a/b")


def test_rows_that_do_not_divide_into_parts_are_refused_before_the_first_step_of_a_run_that_curates_later(curated):
    options = ["--plugins.acid.start", 0.5, "--plugins.acid.groups", 1, "--plugins.acid.filter_ratio", 0.75]
    with pytest.raises(
        ValueError, match="'acid' keeps 2 rows of a global batch of 8, which do not divide into 4 parts"
    ):
        run(curated, *options, "--model.accumulate", 4)


def test_resuming_with_another_choice_or_reference_is_logged(curated, tmp_path, caplog):
    run(curated, "--trainer.max_steps", 5)
    another = torch.load(tmp_path / "teacher" / "step=5.ckpt", weights_only=True)
    another["state_dict"]["model.logit_bias"] += 1
    torch.save(another, tmp_path / "another.ckpt")
    for option, value, told in (
        ("seed", 9, "'seed': 9"),
        ("reference", tmp_path / "another.ckpt", "reference weights"),
    ):
        caplog.clear()
        cli = SigLIP2CLI([*curated, "--trainer.max_steps", "5", f"--plugins.acid.{option}", str(value)], command="fit")
        with caplog.at_level(logging.WARNING):
            logging.getLogger().addHandler(caplog.handler)
            cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=str(tmp_path / "step=5.ckpt"))
        assert "resuming with another stream of samples: curators" in caplog.text
        assert told in caplog.text


def test_evaluation_does_without_the_curator_and_its_reference(curated, tmp_path):
    run(curated, "--trainer.max_steps", 5)
    (tmp_path / "teacher" / "step=5.ckpt").unlink()
    for recipe in ([], curated):
        words = [*recipe, "--ckpt_path", str(tmp_path / "step=5.ckpt")]
        assert "acid" not in SigLIP2CLI(words, command="validate").model.plugins


def test_rules_on_names_leave_the_reference_alone(curated):
    rules = json.dumps([{"match": "vision", "lr": 0.5}, {"match": "acid", "decay": False}])
    _, _, cli = run(curated, "--trainer.max_steps", 3, "--model.rules", rules)
    assert not any(p.requires_grad for p in cli.model.plugins["acid"].parameters())


@pytest.mark.parametrize(("size", "super_batch", "dropped"), [("b16", 65536, 0.5), ("b32", 131072, 0.75)])
def test_curation_recipes_have_the_published_numbers(size, super_batch, dropped):
    """SigLIP 2, section 2.5: batches of 32 768, 4 billion examples, 1e-5, no decay, the sigmoid loss alone."""
    base, over = load_recipe("siglip2-b16-256"), load_recipe(f"stage/acid-{size}")
    plugins = overlay(read_plugins(base["plugins"]), read_plugins(over["plugins"]))
    assert list(plugins) == ["fixed", "sigmoid", "acid"]
    assert (plugins["fixed"]["batch_size"], plugins["acid"]["filter_ratio"]) == (super_batch, dropped)
    adam, published = over["model"]["optimizer"]["init_args"], base["model"]["optimizer"]["init_args"]
    assert adam == {**published, "lr": 1e-5, "weight_decay": 0.0}
    assert over["trainer"]["max_steps"] == 4_000_000_000 // 32768
    narrow = ShapeOptions(width=64, depth=1, mlp_dim=64, num_heads=2)
    options = {**plugins["acid"], "score": "hard_learner"}  # there is no reference here
    sizes = {"size": over["model"].get("size", "B/16"), "vision": narrow, "text": narrow}
    module = TinyModule([Fixed(**plugins["fixed"]), Sigmoid(), ACID(**options)], tiny_tokenizer(), **sizes)
    assert module.plugins["acid"]._draw(super_batch) == Draw(groups=8, chunks=16, per_group=32768 // 128)


@pytest.mark.dist
def test_several_ranks_train_as_one_process_does_under_ddp_and_fsdp2(curated, tmp_path):
    words = [*curated, "--trainer.max_steps", "3", "--trainer.callbacks", "null", "--model.warmup", "0"]
    words += ["--trainer.enable_checkpointing", "false"]
    alone = fit(words).steps
    runs = {name: [*words, "--trainer.strategy", name] for name in ("ddp", "fsdp2")}
    for name, noted in on_ranks(2, runs, tmp_path).items():
        for step, wanted in zip(noted["steps"], alone, strict=True):
            assert step["loss"].item() == pytest.approx(wanted["loss"].item(), rel=1e-5), name
            assert step["state"].keys() == wanted["state"].keys()
        first, wanted = noted["steps"][0]["gradients"], alone[0]["gradients"]
        assert first.keys() == wanted.keys()
        for parameter, gradient in wanted.items():
            torch.testing.assert_close(first[parameter], gradient, rtol=1e-4, atol=1e-6, msg=f"{name}: {parameter}")
