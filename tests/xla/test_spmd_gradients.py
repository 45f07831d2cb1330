"""One step on four XLA devices has the loss and gradients of one device and of a CPU, for each loss and for all."""

import pytest
import torch
from xla_process import run_alone

pytestmark = pytest.mark.xla
FILES = {"4": ("cpu", "xla"), "1": ("xla",)}


@pytest.fixture(scope="module")
def steps(toy_shards, toy_tokenizer, tmp_path_factory):
    """What spmd_gradients.py saved, by device and recipe."""
    folder, found = tmp_path_factory.mktemp("spmd-gradients"), {}
    for count, kinds in FILES.items():
        paths = {kind: folder / f"{kind}-{count}.pt" for kind in kinds}
        words = [f"{kind}={path}" for kind, path in paths.items()]
        run_alone("spmd_gradients.py", toy_shards, toy_tokenizer, folder, *words, CPU_NUM_DEVICES=count)
        found |= {("cpu" if kind == "cpu" else f"xla-{count}"): torch.load(path) for kind, path in paths.items()}
    return found


@pytest.mark.parametrize("other", ["cpu", "xla-1"])
@pytest.mark.parametrize("name", ["all", "sigmoid", "locca", "silc", "tips", "curated"])
def test_loss_and_every_gradient_are_those_of_one_device(steps, other, name):
    found, wanted = steps["xla-4"][name], steps[other][name]
    assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-6, abs=1e-6)
    assert found["gradients"].keys() == wanted["gradients"].keys()
    apart = {n: float((found["gradients"][n] - g).abs().max()) for n, g in wanted["gradients"].items()}
    assert len(apart) > 20
    assert {n: by for n, by in apart.items() if not by <= 1e-6} == {}
