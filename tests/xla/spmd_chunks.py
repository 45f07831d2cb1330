"""Computes the chunked losses on four devices; prints as JSON what is compiled for one of them, and their errors.

Run by test_spmd_chunks.py in a process of its own, which asks XLA for what it compiles (--xla_dump_to).
"""

import json
import re
import sys
from pathlib import Path

import torch
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.distributed.spmd as xs
import torch_xla.runtime as xr

from siglip2.core.chunked import consistency, linear_cross_entropy
from siglip2.xla.sharding import all_devices

ROWS, CLASSES, WIDTH, VIEWS, CHUNK = 256, 96, 24, 2, 16  # rows of one device in a chunk
TEMPERATURES = {"temperature_student": 0.3, "temperature_teacher": 0.2}


def inputs():
    """Rows, which are cut over the devices: of the classifier, its targets and weights, of student and teacher."""
    g = torch.Generator().manual_seed(0)
    x, z, z_teacher = (torch.randn(n, WIDTH, generator=g) for n in (ROWS, VIEWS * ROWS, ROWS))
    return x, torch.randint(CLASSES, (ROWS,), generator=g), torch.rand(ROWS, generator=g), z, z_teacher


def classes():
    """What every device has: classifier and bias, prototypes of student and teacher, centre."""
    g = torch.Generator().manual_seed(1)
    sizes = ((CLASSES, WIDTH), (CLASSES,), (CLASSES, WIDTH), (CLASSES, WIDTH), (CLASSES,))
    return [0.3 * torch.randn(*size, generator=g) for size in sizes]


def classified(rows, whole):
    x, targets, weights, *_ = rows
    weight, bias, *_ = whole
    return linear_cross_entropy(x, weight, bias, targets, weights, max_logits=CHUNK * CLASSES), [x, weight, bias]


def agreed(rows, whole):
    *_, z, z_teacher = rows
    _, _, prototypes, prototypes_teacher, centre = whole
    views, most = z.unflatten(0, (VIEWS, -1)), VIEWS * CHUNK * CLASSES
    loss = consistency(views, prototypes, z_teacher, prototypes_teacher, centre, **TEMPERATURES, max_logits=most)
    return loss, [z, prototypes]


def loss_and_gradients(function, rows, whole):
    for tensor in (*rows, *whole):
        tensor.requires_grad_(tensor.is_floating_point())
    loss, leaves = function(rows, whole)
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def compiled_for_one_device(folder):
    """How many matrix products give each size, and what each collective moves, in the largest program."""
    text = max((path.read_text() for path in Path(folder).glob("*after_optimizations.txt")), key=len)
    products = re.findall(r"= f32\[([\d,]+)\]\S* dot\(", text)
    moved = re.findall(r"= ([^=]*?) (all-\w+|collective-permute|reduce-scatter)\(", text)
    return {size: products.count(size) for size in sorted(set(products))}, [[name, shape] for shape, name in moved]


def main():
    folder = Path(sys.argv[1])
    xr.use_spmd()
    mesh, device = all_devices(), torch_xla.device()
    result = {}
    for name, function in {"classified": classified, "agreed": agreed}.items():
        specs = [xs.ShardingSpec(mesh, ("data",) + (None,) * (t.ndim - 1)) for t in inputs()]
        rows = [
            xm.send_cpu_data_to_device([tensor], device, input_sharding=spec)[0]
            for tensor, spec in zip(inputs(), specs, strict=True)
        ]
        found = loss_and_gradients(function, rows, [t.to(device) for t in classes()])
        torch_xla.sync()
        products, moved = compiled_for_one_device(folder)
        for path in folder.iterdir():
            path.unlink()
        exact = [[t.double() if t.is_floating_point() else t for t in made] for made in (inputs(), classes())]
        expected = loss_and_gradients(function, *exact)
        errors = [((a.cpu() - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected, strict=True)]
        result[name] = {"errors": errors, "products": products, "moved": moved}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
