"""What every plugin promises about a training step."""

import torch

from siglip2.core.plugin import Plugin
from siglip2.plugins.sigmoid import Sigmoid
from siglip2.testing.case import ROWS, Case, require
from siglip2.testing.host_sync import no_host_sync
from siglip2.testing.tiny import TinyModule, fake_batch, tiny_module


def check_loss_reaches_parameters(case: Case) -> None:
    """Its loss is a finite scalar whose gradient reaches the towers and every parameter of its own."""
    module = case.module()
    terms = case.losses(module)
    require(
        case.name in terms,
        f"'{case.name}' gives the terms {list(terms)}, expected one of its own name: implement `loss`, not `losses`",
    )
    for name, term in terms.items():
        require(term.numel() == 1, f"loss term '{name}' has the shape {list(term.shape)}: reduce it to a scalar")
        require(bool(term.isfinite()), f"loss term '{name}' is {term.item()} on {ROWS} samples: it should be finite")
        require(term.requires_grad, f"loss term '{name}' has no gradient: was it computed under no_grad or detached?")
    torch.stack(list(terms.values())).sum().backward()
    own = module.plugins[case.name].named_parameters()
    if cold := [name for name, p in own if p.requires_grad and p.grad is None]:
        raise AssertionError(
            f"no gradient reaches {', '.join(cold)} of '{case.name}': use it in `loss`, or requires_grad_(False)"
        )
    warm = any(p.grad is not None and bool(p.grad.any()) for p in module.model.parameters())
    require(warm, f"the loss of '{case.name}' moves no tower: it should depend on step.encode_image or encode_text")
    sick = [name for name, p in module.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    require(
        not sick, f"'{case.name}' gives gradients that are not finite, in {', '.join(sick[:3])}: guard logs and roots"
    )


def check_state_round_trips(case: Case) -> None:
    """Its state lives under `plugins.<name>.` and holds all that its behaviour depends on."""
    module = case.module()
    bare = {f"model.{name}" for name in module_without(module).state_dict()}
    strangers = [n for n in module.state_dict() if n not in bare and not n.startswith("plugins.")]
    require(not strangers, f"'{case.name}' keeps {strangers[:3]} outside of itself: `setup` should assign to self")
    case.losses(module)
    module.awake_hook("after_step", case.start)(model=module.model, progress=case.start)
    twin = case.module(seed=1)
    missing, unexpected = twin.load_state_dict(module.state_dict(), strict=False)
    require(not missing and not unexpected, f"'{case.name}' has another state once it has run: {missing}, {unexpected}")
    here, there = case.losses(module), case.losses(twin)
    require(
        all(torch.equal(here[name], there[name]) for name in here),
        f"after its state dict is loaded, '{case.name}' gives another loss ({here} became {there}): keep what it "
        f"learns or counts in parameters and buffers (register_buffer), made in `setup`",
    )


def module_without(module: TinyModule) -> torch.nn.Module:
    """Returns fresh towers as `module` built them, before any plugin saw them."""
    patchifiers = [p for p in module.plugins.values() if isinstance(p, Plugin) and hasattr(p, "patchifier")]
    return tiny_module(patchifiers).model


def check_asleep_costs_nothing(case: Case) -> None:
    """With start = 0.5 no hook of it is called at progress 0, no view made, and no gradient reaches it."""
    plugin = case.plugin(start=0.5, stop=1.0)
    require(
        plugin.start == 0.5, f"'{case.name}' starts at {plugin.start} when told 0.5: hand `start` to super().__init__"
    )
    beside = [] if case.name == Sigmoid.name else [Sigmoid()]
    module = tiny_module([*beside, plugin])
    called: list[str] = []
    stop_watching = module.hooks.add_hookcall_monitoring(
        lambda hook, methods, arguments: called.extend(hook for m in methods if m.plugin is plugin), lambda *_: None
    )
    views = {view.name for view in module.views_at(0.0)}
    terms = module(module.fake_batch(0.0, batch_size=ROWS), 0.0)
    module.awake_hook("after_step", 0.0)(model=module.model, progress=0.0)
    stop_watching()
    require(not called, f"'{case.name}' sleeps at progress 0, but its {called[:1]} was called: leave `awake` to Plugin")
    require(views <= {"image", "caption"}, f"'{case.name}' sleeps, but its views {views} are made")
    for term in terms.values():
        term.backward()
    warm = [name for name, p in plugin.named_parameters() if p.grad is not None]
    require(not warm, f"'{case.name}' sleeps, but a gradient reaches its {', '.join(warm[:3])}")
    module.wake_due(0.5)
    module(module.fake_batch(0.5, batch_size=ROWS), 0.5)  # and it wakes in the middle of a run


def check_device_never_waits(case: Case) -> None:
    """A training step reads no value back to the host, and no shape depends on values."""
    module = case.module()
    start = case.start
    batch = module.fake_batch(start, batch_size=ROWS)
    try:
        with no_host_sync():
            module(batch, start)
            module.awake_hook("after_step", start)(model=module.model, progress=start)
    except AssertionError as error:
        raise AssertionError(f"plugin '{case.name}': {error}") from error


def check_encoders_are_frozen(case: Case) -> None:
    """Its encoders give image features without gradient, and their parameters are not trained."""
    module = case.module()
    step = module.make_step(fake_batch(patchifier=module.patchifier, batch_size=ROWS), case.start)
    own = module.plugins[case.name].encoders()  # type: ignore[operator]
    require(bool(own), f"'{case.name}' implements `encoders` but offers none")
    for name, encoder in own.items():
        embedding = step.encode_image("image", by=name).embedding
        require(
            embedding.shape[0] == ROWS and not embedding.requires_grad,
            f"encoder '{name}' should give [{ROWS}, E] embeddings",
        )
        trained = [n for n, p in encoder.named_parameters() if p.requires_grad]
        require(
            not trained,
            f"encoder '{name}' of '{case.name}' has trainable parameters ({', '.join(trained[:2])}, ...): the "
            f"optimizer would decay them. Call requires_grad_(False)",
        )


def check_curator_keeps_rows(case: Case) -> None:
    """It answers with distinct local row numbers, the same number of them for every batch of a size."""
    module = case.module()
    start = case.start
    counts = set()
    for first in (0, ROWS):
        step = module.make_step(module.fake_batch(start, batch_size=ROWS, first=first), start)
        kept = module.awake_hook("curate", start)(step=step)
        if kept is None:
            continue
        require(
            kept.dtype == torch.int64 and kept.ndim == 1,
            f"`curate` gave {kept.dtype} {list(kept.shape)}, not int64 [b']",
        )
        rows = kept.tolist()
        require(len(set(rows)) == len(rows), f"`curate` of '{case.name}' keeps a row twice: {rows}")
        require(all(0 <= r < ROWS for r in rows), f"`curate` of '{case.name}' keeps rows {rows} of a batch of {ROWS}")
        require(step.select(kept).batch.size == len(rows), "a step of the kept rows should have that many")
        counts.add(len(rows))
    require(len(counts) <= 1, f"'{case.name}' keeps {counts} rows of equal batches: shapes should not depend on values")
