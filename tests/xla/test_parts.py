"""What the XLA package does without XLA: partitions, hosts, precision, checkpoints in folders, and its errors."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.strategies import StrategyRegistry

import siglip2.xla.accelerator
from siglip2.xla import PjrtAccelerator, XLAAutocast, register
from siglip2.xla.checkpoint import read_sharded
from siglip2.xla.hosts import Hosts
from siglip2.xla.precision import on_xla
from siglip2.xla.sharding import parameter_partition


@pytest.mark.parametrize(
    ("shape", "partition"),
    [
        ((768, 3072), (None, "data")),
        ((3072, 768), ("data", None)),
        ((16, 16, 768), (None, None, "data")),
        ((1001, 64), (None, "data")),  # the longest does not divide
        ((1001, 77), None),
        ((768,), None),  # small
        ((), None),
    ],
)
def test_parameter_is_cut_along_the_longest_dimension_that_divides(shape, partition):
    assert parameter_partition(shape, num_devices=4, min_size=4096) == partition


def test_one_device_cuts_nothing():
    assert parameter_partition((768, 3072), num_devices=1, min_size=1) is None


def on_hosts(count, task):
    """What `task` returns on each of several hosts, which are threads here."""
    store = dist.HashStore()
    with ThreadPoolExecutor(count) as pool:
        waiting = [pool.submit(task, Hosts(store, number, count)) for number in range(count)]
        return [answer.result(timeout=30) for answer in waiting]


def test_hosts_exchange_what_each_gave_in_the_order_of_their_ranks():
    found = on_hosts(3, lambda hosts: [hosts.exchange({"rank": hosts.rank, "round": n}) for n in range(4)])
    expected = [[{"rank": rank, "round": n} for rank in range(3)] for n in range(4)]
    assert found == [expected] * 3


def test_a_host_on_its_own_needs_no_store():
    assert Hosts().exchange("path") == ["path"]
    with pytest.raises(ValueError, match="2 hosts need a store"):
        Hosts(size=2)


def test_trainer_precision_is_translated():
    assert on_xla(Precision()).precision == "32-true"
    assert isinstance(on_xla(MixedPrecision("bf16-mixed", "cuda")), XLAAutocast)
    with pytest.raises(ValueError, match="bf16-true: on XLA devices use 32-true or bf16-mixed"):
        on_xla(HalfPrecision("bf16-true"))


def test_devices_are_one_or_all(monkeypatch):
    monkeypatch.setenv("PJRT_DEVICE", "CPU")
    monkeypatch.setenv("CPU_NUM_DEVICES", "4")
    monkeypatch.setattr(siglip2.xla.accelerator, "INSTALLED", True)
    assert [PjrtAccelerator.parse_devices(n) for n in ("auto", -1, 4, "1")] == [4, 4, 4, 1]
    with pytest.raises(ValueError, match="one device or all 4"):
        PjrtAccelerator.parse_devices(2)


def test_a_missing_torch_xla_is_named_with_what_to_install(monkeypatch):
    monkeypatch.setattr(siglip2.xla.accelerator, "INSTALLED", False)
    register()
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'siglip2\[tpu\]'"):
        AcceleratorRegistry.get("xla")
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'siglip2\[tpu\]'"):
        StrategyRegistry.get("xla_spmd_sharded")


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no rest.ckpt"):
        read_sharded(tmp_path)


def test_registering_the_strategy_does_not_load_torch_xla():
    code = "import sys, siglip2.xla; siglip2.xla.register(); sys.exit('torch_xla' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
