"""All shards of a data set: which are done already, and the rest, one after another or in several processes."""

import contextlib
import json
import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

import torch

from siglip2.annotation.settings import Settings
from siglip2.annotation.shard import Record, annotate_shard, check_first, finished
from siglip2.core.data.storage import expand_shards, is_local, read_file, write_file

FORMAT = 1  # raise it when the same settings come to mean other shards
SUMMARY = "annotate.json"

Job = tuple[str, str]  # a shard, and where it is written
Work = Generator[tuple[Job, Record], None, None]  # yields each shard when it is done


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Args:
        shards: done, those of earlier runs included.
        total: of shards.
        samples: annotated in this run.
    """

    shards: int
    total: int
    samples: int


@dataclass(frozen=True)
class Summary:
    """What `annotate` made.

    Args:
        num_shards: of the data set.
        num_done_before: shards that an earlier run had annotated.
        counts: over all of them; see docs/annotation.md.
        faults: samples that were copied as they are, and damaged shards, with the reason.
    """

    num_shards: int
    num_done_before: int
    counts: Counter[str]
    faults: tuple[str, ...]


def annotate(
    spec: str | Sequence[str],
    out: str,
    settings: Settings,
    *,
    workers: int = 1,
    devices: Sequence[str] = (),
    progress: Callable[[Progress], None] | None = None,
) -> Summary:
    """Writes the shards of a data set again, with boxes; shards that are there already are not made anew.

    Args:
        spec: shards as `expand_shards` takes them; one named twice is annotated once.
        out: folder or URL; made if need be. Shards keep their file names.
        settings: what to ask and what to keep.
        workers: processes, each with a detector of its own; 1 works in this one. Their number changes no byte.
        devices: worker k works on `devices[k % len(devices)]`; all GPUs if empty, else the CPU.
        progress: called after each batch and each shard.

    Returns:
        What is also written to `out/annotate.json`.

    Raises:
        FileNotFoundError: if a shard or the detector is missing.
        ValueError: if a file is no shard by its name; if the first shard has no samples, or these have no such fields;
            if `out` holds something else, or shards made with other settings; if two shards have one name, or one would
            be written over itself.
        RuntimeError: if a worker was killed.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}, expected at least 1")
    shards = list(dict.fromkeys(expand_shards(spec)))
    if others := [shard for shard in shards if is_local(shard) and not shard.endswith(".tar")]:
        raise ValueError(f"{others[0]} is no tar shard; expected such as data/{{00000..00012}}.tar")
    out = out.removeprefix("file://").rstrip("/")
    jobs = _jobs(shards, out)
    recorded = settings.recorded()
    check_first(shards[0], settings)
    _open_folder(out, recorded)
    records = {job: record for job in jobs if (record := finished(*job)) is not None}
    num_done_before, num_samples = len(records), 0
    todo = [job for job in jobs if job not in records]

    def tick(samples: int) -> None:
        nonlocal num_samples
        num_samples += samples
        if progress is not None:
            progress(Progress(len(records), len(jobs), num_samples))

    devices = devices or [f"cuda:{k}" for k in range(torch.cuda.device_count())] or ["cpu"]
    work = _here(todo, settings, devices[0], tick) if workers == 1 else _apart(todo, settings, workers, devices, tick)
    with contextlib.closing(work):
        for job, record in work:
            records[job] = record
            tick(0)
    counts: Counter[str] = Counter()
    for job in jobs:
        counts.update(records[job].counts)
    summary = {"format": FORMAT, "settings": recorded, "shards": len(jobs), "counts": counts}
    write_file(f"{out}/{SUMMARY}", _stored(summary))
    faults = tuple(fault for job in jobs for fault in records[job].faults)
    return Summary(len(jobs), num_done_before, counts, faults)


def _jobs(shards: Sequence[str], out: str) -> list[Job]:
    targets: dict[str, str] = {}
    for shard in shards:
        target = f"{out}/{shard.rpartition('/')[2]}"
        if target in targets:
            raise ValueError(
                f"{targets[target]} and {shard} would both become {target}; annotate one folder at a time, each with "
                f"a folder of its own to write to"
            )
        if is_local(shard) and is_local(target) and os.path.realpath(shard) == os.path.realpath(target):
            raise ValueError(f"{shard} would be written over itself; choose another folder than {out}")
        targets[target] = shard
    return [(shard, target) for target, shard in targets.items()]


def _open_folder(out: str, recorded: dict[str, Any]) -> None:
    """Leaves `out` with the settings in it; ValueError if it holds others, or other things."""
    if is_local(out):
        os.makedirs(out, exist_ok=True)
    try:
        found = json.loads(read_file(f"{out}/{SUMMARY}"))
        old = found["settings"] if found["format"] == FORMAT else {}
    except FileNotFoundError:
        if is_local(out) and (names := sorted(os.listdir(out))):
            raise ValueError(f"{out} holds {names[0]} but no {SUMMARY}; choose a new or empty folder") from None
        write_file(f"{out}/{SUMMARY}", _stored({"format": FORMAT, "settings": recorded}))
        return
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{out}/{SUMMARY} is none of ours; choose a new or empty folder") from None
    new = json.loads(_stored(recorded))
    differing = [
        f"{key}={old.get(key)} (asked for: {new.get(key)})" for key in old | new if old.get(key) != new.get(key)
    ]
    if differing:
        raise ValueError(f"{out} was annotated with {', '.join(differing)}; choose another folder")


def _stored(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True).encode() + b"\n"


def _here(jobs: Sequence[Job], settings: Settings, device: str, tick: Callable[[int], None]) -> Work:
    """Annotates shards in this process."""
    if jobs:
        detector = settings.open_detector(device)
        for job in jobs:
            yield job, annotate_shard(*job, settings=settings, detector=detector, tick=tick)


def _apart(
    jobs: Sequence[Job], settings: Settings, workers: int, devices: Sequence[str], tick: Callable[[int], None]
) -> Work:
    """Annotates shards in processes of their own."""
    context = multiprocessing.get_context("spawn")  # CUDA cannot be used after a fork
    waiting = list(reversed(jobs))
    processes: list[SpawnProcess] = []
    busy: dict[Connection, tuple[SpawnProcess, Job]] = {}
    try:
        for k in range(min(workers, len(jobs))):
            ours, theirs = context.Pipe()
            arguments = (theirs, settings, devices[k % len(devices)], workers)
            processes.append(context.Process(target=_serve, args=arguments, daemon=True))
            processes[-1].start()
            theirs.close()  # the worker's end is its own, so that either side sees when the other is gone
            busy[ours] = processes[-1], waiting.pop()
            _give(ours, *busy[ours])
        while busy:
            for pipe in wait(list(busy)):
                assert isinstance(pipe, Connection)
                process, job = busy[pipe]
                said = _received(pipe, process, job)
                if isinstance(said, int):
                    tick(said)
                    continue
                if waiting:
                    busy[pipe] = process, waiting.pop()
                    _give(pipe, *busy[pipe])
                else:
                    del busy[pipe]
                    pipe.close()  # by which the worker ends
                yield job, said
    finally:
        for process, _ in busy.values():
            process.terminate()
        for process in processes:
            process.join()


def _received(pipe: Connection, process: SpawnProcess, job: Job) -> Record | int:
    try:
        said = pipe.recv()
    except (EOFError, ConnectionResetError):
        raise _lost(process, job) from None
    if isinstance(said, Exception):
        said.add_note(f"while annotating {job[0]}")
        raise said
    assert isinstance(said, Record | int)
    return said


def _give(pipe: Connection, process: SpawnProcess, job: Job) -> None:
    try:
        pipe.send(job)
    except (BrokenPipeError, ConnectionResetError):
        raise _lost(process, job) from None


def _lost(process: SpawnProcess, job: Job) -> RuntimeError:
    process.join()
    return RuntimeError(
        f"the worker on {job[0]} ended with status {process.exitcode} (-9: killed, perhaps out of memory); what is "
        f"done is kept, so run the same command again, with fewer --workers or a smaller --batch-size"
    )


def _serve(pipe: Connection, settings: Settings, device: str, workers: int) -> None:
    """A worker: takes shards until nobody is left to give it one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and ends its workers
    if device == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        detector = None
        while True:
            shard, target = pipe.recv()
            said: Record | Exception
            try:
                detector = detector or settings.open_detector(device)
                said = annotate_shard(shard, target, settings=settings, detector=detector, tick=pipe.send)
            except (BrokenPipeError, ConnectionResetError):
                raise
            except (OSError, ValueError) as error:
                said = error
            except Exception as error:  # of any kind, perhaps one that cannot be sent
                said = RuntimeError(f"{type(error).__name__}: {error}")
            pipe.send(said)
