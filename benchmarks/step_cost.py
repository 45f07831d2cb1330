"""What a step with all losses costs against the sum of its unique parts, all in one run and one process.

The parts: student on the image, on the local crops (`silc`) and on the masked global view (`tips`), the text tower, the
decoder (`locca`), each forward and backward with its head and loss, and the teacher forward once. The whole is one
forward and backward of the recipe's losses; optimizer and moving average are in neither. Rounds alternate between them;
the ratio of a round is whole / sum. The forwards of each network in a step are counted, too. On a CPU the process keeps
its memory between steps, as a GPU's allocator does: given back, it would be zeroed by the kernel again, which takes the
longer the more is held at once. Run: python benchmarks/step_cost.py
"""

import argparse
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from siglip2.core.data.text import Tokenizer
from siglip2.core.step import STUDENT, Step
from siglip2.plugins.ema_teacher import EMATeacher
from siglip2.plugins.fixed import Fixed
from siglip2.plugins.locca import LocCa
from siglip2.plugins.sigmoid import Sigmoid
from siglip2.plugins.silc import SILC
from siglip2.plugins.tips import TIPS
from siglip2.testing import TinyModule, tiny_tokenizer

KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_TOP_PAD_": str(2**30)}
PROGRESS = 0.9
EXPECTED = {"student": 3, "teacher": 1, "text": 1, "decoder": 1}


def build(args: argparse.Namespace) -> TinyModule:
    """Returns the module of the published recipe at the chosen size; pictures and captions are the tests' own."""
    file = tiny_tokenizer().file
    tokenizer = Tokenizer(file, replace(tiny_tokenizer().contract, length=64, vocab_size=args.vocab))
    patch_size = int(args.size.split("/")[1])
    heads = {"prototypes": args.prototypes, "freeze_prototypes": 0.0}
    plugins = [
        Fixed(image_size=args.image_size, patch_size=patch_size, batch_size=args.batch),
        Sigmoid(),
        LocCa(),
        EMATeacher(),
        SILC(weight=0.25, local_size=args.local_size, **heads),
        TIPS(weight=0.0625, **heads),
    ]
    module = TinyModule(plugins, tokenizer, size=args.size, fused_attention=not args.unfused)
    return module.to(args.device)


class Parts:
    """Runs each part alone, with what it takes from other parts given to it ready-made."""

    def __init__(self, module: TinyModule, batch: Any):
        self.module, self.batch = module, batch
        step = self.step()
        self.image = step.encode_image("image")
        self.caption = step.encode_text("caption")
        self.teacher_view = step.encode_image("global", by="teacher")
        self.grads = [torch.randn_like(t) for t in (self.image.tokens, self.image.embedding, self.caption.embedding)]
        self.runs: dict[str, Callable[[], None]] = {
            "student, image": self.run_image,
            "student, locals": lambda: self.run_objective("silc"),
            "student, masked": lambda: self.run_objective("tips"),
            "teacher": self.run_teacher,
            "text": self.run_text,
            "decoder": lambda: self.run_objective("locca"),
        }

    def step(self, **given: Any) -> Step:
        """Returns a step on the batch; `given` are features that it need not compute, as view=(encoder, features)."""
        step = self.module.make_step(self.batch, PROGRESS)
        for view, (encoder, features) in given.items():
            leaf = {k: v.detach().requires_grad_(encoder == STUDENT) for k, v in _tensors(features).items()}
            step._features[view.rstrip("_"), encoder] = features._replace(**leaf)
        return step

    def run_image(self) -> None:
        features = self.step().encode_image("image")
        torch.autograd.backward([features.tokens, features.embedding], self.grads[:2])

    def run_text(self) -> None:
        self.step().encode_text("caption").embedding.backward(self.grads[2])

    def run_teacher(self) -> None:
        self.step().encode_image("global", by="teacher")

    def run_objective(self, name: str) -> None:
        ready = {"image": (STUDENT, self.image), "global_": ("teacher", self.teacher_view)}
        plugin: Any = self.module.plugins[name]
        plugin.loss(self.step(**ready)).backward()


def _tensors(features: Any) -> dict[str, Tensor]:
    return {k: v for k, v in features._asdict().items() if isinstance(v, Tensor) and v.is_floating_point()}


def whole(module: TinyModule, batch: Any) -> None:
    """One forward and backward of all losses."""
    torch.stack(list(module(batch, PROGRESS).values())).sum().backward()


def count_forwards(module: TinyModule, batch: Any) -> Counter[str]:
    """Returns how often each network runs in one step."""
    calls: Counter[str] = Counter()
    networks: dict[str, Any] = {"student": module.model.vision, "text": module.model.text}
    networks |= {"teacher": module.plugins["ema_teacher"], "decoder": module.plugins["locca"].decoder}
    hooks = [n.register_forward_hook(lambda *_, name=name: calls.update([name])) for name, n in networks.items()]
    whole(module, batch)
    for hook in hooks:
        hook.remove()
    return calls


def seconds(run: Callable[[], None], module: TinyModule, autocast: bool) -> float:
    """Returns how long `run` takes, under the precision of the run, with gradients cleared before."""
    module.zero_grad(set_to_none=True)
    cuda = module.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.autocast(module.device.type, dtype=torch.bfloat16, enabled=autocast):
        run()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="B/16")
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--local-size", type=int, default=96)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--prototypes", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--unfused", action="store_true", help="Multiply attention out; faster in bf16 on a CPU.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.device == "cpu" and not KEEP_MEMORY.keys() <= os.environ.keys():  # glibc reads them when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_MEMORY})
    torch.manual_seed(0)
    module = build(args)
    module.wake_due(PROGRESS)
    autocast = args.precision == "bf16"
    batch = module.fake_batch(PROGRESS, batch_size=args.batch).to(module.device)
    with torch.autocast(module.device.type, dtype=torch.bfloat16, enabled=autocast):
        parts = Parts(module, batch)
        calls = count_forwards(module, batch)
    assert calls == Counter(EXPECTED), f"a view was encoded twice: {dict(calls)}, expected {EXPECTED}"
    print(f"forwards in a step: {dict(calls)}", flush=True)
    for run in parts.runs.values():  # memory, kernels
        seconds(run, module, autocast)
    ratios, spent = [], {name: [] for name in parts.runs}
    for number in range(args.rounds):
        first = seconds(lambda: whole(module, batch), module, autocast) if number % 2 else None
        for name, run in parts.runs.items():
            spent[name].append(seconds(run, module, autocast))
        total = first or seconds(lambda: whole(module, batch), module, autocast)
        ratios.append(total / sum(times[-1] for times in spent.values()))
        print(f"round {number}: whole / sum of parts = {ratios[-1]:.3f}", flush=True)
    medians = {name: statistics.median(times) for name, times in spent.items()}
    for name, median in medians.items():
        print(f"  {name:16} {median / sum(medians.values()):6.1%} of the sum")
    print(
        f"{args.size} at {args.image_size} px, batch {args.batch}, {args.vocab} tokens, {args.prototypes} prototypes, "
        f"{args.precision}, {args.device}, torch {torch.__version__}: whole / sum of parts = "
        f"{statistics.median(ratios):.3f} (median of {args.rounds} rounds, {min(ratios):.3f} to {max(ratios):.3f})"
    )


if __name__ == "__main__":
    main()
