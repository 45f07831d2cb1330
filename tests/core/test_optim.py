"""The optimizer takes big_vision's steps, decays what big_vision decays, and finds its state by name."""

import numpy as np
import pytest
import torch
from torch import nn

from siglip2.core.model.two_towers import build_two_towers
from siglip2.core.optim import (
    KERNELS_ONLY,
    Rule,
    StepCountLR,
    apply_lr_factors,
    check_rules,
    freeze,
    layers_above,
    match_state_by_name,
    param_groups,
    published_adamw,
    settle,
    without_state_of,
)
from siglip2.core.schedules import warmup_cosine


@pytest.fixture(scope="module")
def b16():
    """B/16 with Gemma's vocabulary, without memory."""
    with torch.device("meta"):
        return build_two_towers("B/16", patch_size=16, grid=(16, 16), vocab_size=256_000, context_length=64)


@pytest.fixture
def small():
    torch.manual_seed(0)
    return nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Linear(4, 2)}).double()


def groups_of(optimizer):
    """name -> options of its group."""
    return {name: group for group in optimizer.param_groups for name in group["param_names"]}


def big_vision_steps(parameter, gradients, *, lr, decay, wd, total, warmup, b1=0.9, b2=0.95, eps=1e-8):
    """The chain of big_vision/optax.py: adam, times lr, plus wd * parameter, times the schedule, negated."""
    p, m, v = parameter.copy(), np.zeros_like(parameter), np.zeros_like(parameter)
    for step, g in enumerate(gradients):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        update = (m / (1 - b1 ** (step + 1))) / (np.sqrt(v / (1 - b2 ** (step + 1))) + eps)
        update = lr * update + (wd * p if decay else 0)
        ramp = min(1.0, step / warmup) * 0.5 * (1 + np.cos(np.pi * np.clip((step - warmup) / (total - warmup), 0, 1)))
        p = p - ramp * update
    return p


@pytest.mark.parametrize("name", ["a.weight", "a.bias"])
def test_published_adamw_takes_the_steps_of_big_vision(small, name):
    optimizer = published_adamw(param_groups(small, [KERNELS_ONLY]))
    schedule = StepCountLR(optimizer, lambda step: warmup_cosine(step, total=6, warmup=2))
    parameter = dict(small.named_parameters())[name]
    before = parameter.detach().numpy().copy()
    gradients = [np.random.default_rng(i).normal(size=before.shape) for i in range(5)]
    for g in gradients:
        parameter.grad = torch.from_numpy(g)
        optimizer.step()
        schedule.step()
    expected = big_vision_steps(before, gradients, lr=1e-3, decay=name.endswith("weight"), wd=1e-4, total=6, warmup=2)
    np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-12, atol=1e-14)


def test_exactly_the_matrices_of_linear_layers_decay(b16):
    kernels = {f"{name}.weight" for name, module in b16.named_modules() if isinstance(module, nn.Linear)}
    decayed = {name for name, p in b16.named_parameters() if settle(f"model.{name}", p.ndim, [KERNELS_ONLY]).decay}
    assert decayed == kernels


def test_every_trainable_parameter_is_in_one_group(b16):
    names = [name for group in param_groups(b16, [KERNELS_ONLY]) for name, _ in group["params"]]
    assert sorted(names) == sorted(name for name, _ in b16.named_parameters())


def test_last_rule_that_says_something_wins():
    rules = [Rule("vision", lr=0.1, decay=False), Rule("vision.norm", lr=0.5), Rule("norm", frozen=True)]
    says = settle("model.vision.norm.weight", 2, rules)
    assert (says.lr, says.decay, says.frozen) == (0.5, False, True)


def test_rule_can_make_a_vector_decay():
    assert settle("model.text.head.bias", 1, [KERNELS_ONLY, Rule("head.bias", decay=True)]).decay


def test_frozen_parameters_have_no_gradient_and_no_group(small):
    freeze(small, [Rule(r"^a\.", frozen=True)])
    names = [name for group in param_groups(small, []) for name, _ in group["params"]]
    assert names == ["b.weight", "b.bias"]
    assert not small["a"].weight.requires_grad


def test_lr_factor_multiplies_the_learning_rate(small):
    optimizer = published_adamw(param_groups(small, [Rule(r"^b\.", lr=0.1)]))
    apply_lr_factors(optimizer)
    rates = {name: group["lr"] for name, group in groups_of(optimizer).items()}
    assert rates == pytest.approx({"a.weight": 1e-3, "a.bias": 1e-3, "b.weight": 1e-4, "b.bias": 1e-4})


def test_rule_that_fits_no_parameter_is_an_error_with_examples(small):
    names = [name for name, _ in small.named_parameters()]
    with pytest.raises(ValueError, match=r"'vison' fits no parameter; names look like a\.weight"):
        check_rules(names, [Rule("vison")])


def test_rule_that_is_no_regular_expression_is_an_error():
    with pytest.raises(ValueError, match=r"'\(' is not a regular expression"):
        check_rules(["a"], [Rule("(")])


def trained(module, rules=(), steps=3):
    """An optimizer that has taken steps, its state found by name on load."""
    optimizer = published_adamw(param_groups(module, rules))
    apply_lr_factors(optimizer)
    optimizer.register_load_state_dict_pre_hook(match_state_by_name)
    for step in range(steps):
        for number, parameter in enumerate(module.parameters()):
            parameter.grad = torch.full_like(parameter, float(step + number))
        optimizer.step()
    return optimizer


def moments(optimizer):
    """name -> running mean of the gradient."""
    return {
        name: optimizer.state[p]["exp_avg"]
        for group in optimizer.param_groups
        for name, p in zip(group["param_names"], group["params"], strict=True)
        if p in optimizer.state
    }


def linears(*names):
    return nn.ModuleDict({name: nn.Linear(3, 3) for name in names})


@pytest.mark.parametrize(("before", "after"), [("ab", "acb"), ("ab", "cab"), ("acb", "ab"), ("ab", "ba"), ("ab", "cd")])
def test_optimizer_state_follows_parameter_names(before, after):
    saved = trained(linears(*before))
    loaded = trained(linears(*after), steps=0)
    loaded.load_state_dict(saved.state_dict())
    expected = {name: m for name, m in moments(saved).items() if name.split(".")[0] in after}
    found = moments(loaded)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_parameters_whose_state_is_left_out_have_no_moments_and_the_others_keep_theirs():
    saved = trained(linears("a", "ab", "b"))
    loaded = trained(linears("a", "ab", "b"), steps=0)
    loaded.load_state_dict(without_state_of(saved.state_dict(), ("a.", "c.")))
    expected = {name: m for name, m in moments(saved).items() if not name.startswith("a.")}
    found = moments(loaded)
    assert found.keys() == expected.keys() == {"ab.weight", "ab.bias", "b.weight", "b.bias"}
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_new_parameters_start_at_the_first_step_after_resume():
    saved, module = trained(linears("a")), linears("a", "b")
    loaded = trained(module, steps=0)
    loaded.load_state_dict(saved.state_dict())
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    loaded.step()
    steps = {name: float(loaded.state[p]["step"]) for name, p in module.named_parameters()}
    assert steps == {"a.weight": 4, "a.bias": 4, "b.weight": 1, "b.bias": 1}


def test_optimizer_options_of_a_new_group_are_its_own():
    saved = trained(linears("a"))
    loaded = trained(linears("a", "b"), rules=[Rule(r"^b\.", lr=0.1)], steps=0)
    loaded.load_state_dict(saved.state_dict())
    rates = {name: group["lr"] for name, group in groups_of(loaded).items()}
    assert rates == pytest.approx({"a.weight": 1e-3, "a.bias": 1e-3, "b.weight": 1e-4, "b.bias": 1e-4})


@pytest.mark.parametrize(("before", "after"), [("ab", "ab"), ("ab", "a"), ("a", "ab"), ("ab", "ba")])
def test_resumed_schedule_gives_every_group_its_own_rate(before, after):
    def factor(step):
        return warmup_cosine(step, total=10, warmup=2)

    rules = [Rule(r"^b\.", lr=0.1)]
    saved, loaded = trained(linears(*before), rules), trained(linears(*after), rules, steps=0)
    old, new = StepCountLR(saved, factor), StepCountLR(loaded, factor)
    for _ in range(3):
        saved.step()
        old.step()
    loaded.load_state_dict(saved.state_dict())
    new.load_state_dict(old.state_dict())
    rates = {name: group["lr"] for name, group in groups_of(loaded).items()}
    assert rates == pytest.approx({name: (1e-4 if name[0] == "b" else 1e-3) * factor(3) for name in rates})
    assert new.get_last_lr() == [group["lr"] for group in loaded.param_groups]


def test_layer_decay_lowers_the_learning_rate_once_for_every_layer_above(b16):
    """Of BEiT: the last block has 0.8 of the head's, the embeddings of twelve blocks 0.8 to the 13th."""
    module = nn.ModuleDict({"model": b16})
    rules = [KERNELS_ONLY, Rule(r"^model\.(vision|text)\.", layer_decay=0.8), Rule(r"text\.blocks\.11\.", lr=2.0)]
    found = {name: g["lr_factor"] for g in param_groups(module, rules) for name, _ in g["params"]}
    expected = {
        "model.logit_scale": 1.0,
        "model.vision.pool.latent": 1.0,
        "model.vision.norm.weight": 1.0,
        "model.text.head.weight": 1.0,
        "model.vision.blocks.11.mlp.fc1.weight": 0.8,
        "model.vision.blocks.0.attn.qkv.bias": 0.8**12,
        "model.vision.embed.weight": 0.8**13,
        "model.vision.pos_embed": 0.8**13,
        "model.text.token_embed.weight": 0.8**13,
        "model.text.blocks.10.norm1.weight": 0.8**2,
        "model.text.blocks.11.norm1.weight": 2.0,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_layers_of_towers_of_other_depth_and_of_timm_are_counted_from_their_own_top():
    names = ["model.text.blocks.1.a", "model.vision.trunk.blocks.3.a", "model.vision.trunk.patch_embed.proj.weight"]
    others = ["plugins.silc.vision.blocks.9.a", "model.vision.trunk.norm.bias", "model.logit_bias"]
    found = {names[0]: 1, names[1]: 1, names[2]: 5, others[1]: 0}
    assert layers_above([*names, *others]) == found


@pytest.mark.parametrize("factor", [0.0, 1.5])
def test_layer_decay_that_is_no_factor_is_refused(factor):
    with pytest.raises(ValueError, match="layer_decay is a factor in"):
        Rule("model", layer_decay=factor)
