"""Starts the scripts of this folder, each in a process of its own with virtual XLA devices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

DEVICES = {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "4", "OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "2"}
# the compiler's optimisation takes three times as long as all else, and moves float32 results by 1e-5
QUICK = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}


def run_alone(script, *arguments, **settings):
    """Returns what a script prints as JSON in its last line."""
    pytest.importorskip("torch_xla")
    command = [sys.executable, str(Path(__file__).with_name(script)), *map(str, arguments)]
    folders = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, **DEVICES, **QUICK, "PYTHONPATH": folders, **settings}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=1200)
    assert done.returncode == 0, done.stderr[-8000:]
    return json.loads(done.stdout.splitlines()[-1])
