"""Memory and time of the sigmoid loss over all pairs of one process, against open_clip's and transformers'.

For each batch size and side: what autograd keeps between forward and backward beyond the inputs, the peak of what is
allocated beyond inputs and gradients, and the time of forward and backward in turns with ours. Peaks are counted from
torch's own allocations (torch.profiler would miss temporaries that are freed inside an operator; a dispatch mode sees
each result). One process, one run: python benchmarks/sigmoid_memory.py
"""

import argparse
import gc
import math
import statistics
import time
import weakref
from collections.abc import Callable

import torch
import torch.nn.functional as F
from open_clip.loss import SigLipLoss
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from siglip2.core.functional import sigmoid_loss
from siglip2.core.pairs import pair_loss

MIB = 2**20
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Allocated(TorchDispatchMode):
    """Counts the bytes of tensors that were made inside and are alive; `peak` is their most."""

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.peak, self._seen = 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage(), given)
        return result

    def _note(self, storage, given):
        place = storage.data_ptr()
        if place in given or place in self._seen:
            return
        size = storage.nbytes()
        self._seen[place] = size
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._forget, place)

    def _forget(self, place):
        self.alive -= self._seen.pop(place, 0)


def leaves(batch_size: int, width: int) -> list[Tensor]:
    """Unit-norm embeddings, temperature and bias, all with gradient."""
    rows = [F.normalize(torch.randn(batch_size, width), dim=-1) for _ in range(2)]
    return [t.requires_grad_() for t in (*rows, torch.tensor([math.log(10.0)]), torch.tensor([-10.0]))]


def ours(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return pair_loss(image, text, scale=scale, bias=bias)


def unchunked(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return sigmoid_loss(image, text, scale=scale, bias=bias)


def open_clip(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """open_clip's loss on one rank; the released 3.3.0 has no chunks."""
    return SigLipLoss()(image, text, scale.exp(), bias)


def transformers(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """What transformers' SiglipModel.forward does with its embeddings when it is asked for a loss."""
    logits = text @ image.T * scale.exp() + bias
    signs = 2 * torch.eye(logits.shape[0]) - torch.ones_like(logits)
    return -F.logsigmoid(signs * logits).sum(dim=-1).mean()


def kept(loss: Loss, inputs: list[Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass, inputs left out."""
    given = {t.untyped_storage().data_ptr() for t in inputs}
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss(*inputs).backward()
    for tensor in inputs:
        tensor.grad = None
    return sum(found.values())


def peak(loss: Loss, inputs: list[Tensor]) -> int:
    """Peak bytes of forward and backward beyond the inputs and their gradients."""
    gc.collect()
    with Allocated() as mode:
        loss(*inputs).backward()
    for tensor in inputs:
        tensor.grad = None
    return mode.peak - sum(t.numel() * t.element_size() for t in inputs)


def seconds(loss: Loss, inputs: list[Tensor]) -> float:
    """Time of one forward and backward pass."""
    began = time.perf_counter()
    loss(*inputs).backward()
    took = time.perf_counter() - began
    for tensor in inputs:
        tensor.grad = None
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--largest-matrix", type=int, default=8192, help="largest batch of the sides that keep B x B")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    others: dict[str, Loss] = {"unchunked": unchunked, "transformers": transformers, "open_clip": open_clip}
    print("| B | side | kept beyond inputs and gradients, MiB | peak beyond them, MiB | time of theirs / ours |")
    print("|---|---|---|---|---|")
    for batch_size in args.batch_sizes:
        inputs = leaves(batch_size, args.width)
        gradients = sum(t.numel() * t.element_size() for t in inputs)  # which ours keeps, and others make later
        row = f"| {batch_size} | ours | {(kept(ours, inputs) - gradients) / MIB:.1f} |"
        print(f"{row} {peak(ours, inputs) / MIB:.1f} | |", flush=True)
        for name, loss in others.items() if batch_size <= args.largest_matrix else ():
            ratios = []
            for _ in range(args.rounds):
                mine, theirs = seconds(ours, inputs), seconds(loss, inputs)
                ratios.append(theirs / mine)
            timed = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            row = f"| {batch_size} | {name} | {kept(loss, inputs) / MIB:.1f} | {peak(loss, inputs) / MIB:.1f} |"
            print(f"{row} {timed} |", flush=True)


if __name__ == "__main__":
    main()
