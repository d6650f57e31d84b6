"""A function in several processes, as torchrun starts them, but forked: nothing is imported anew."""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

LONGEST = 900  # seconds
OF_AGENT = {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}  # none of them opens a port


def in_processes(function: Callable[[int], Any], folder: Path, count: int = 2) -> list[Any]:
    """What `function` returns in each of `count` processes, by their numbers, with which it is called."""
    if torch.cuda.is_initialized():
        pytest.skip("a process that has computed on a GPU cannot be forked")
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # at a port that is free
    children = [_start(function, folder, rank, count, store.port) for rank in range(count)]
    deadline, failed = time.monotonic() + LONGEST, []
    while children and time.monotonic() < deadline and not failed:
        for child in list(children):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                children.remove(child)
                failed += [status] if status else []
        time.sleep(0.01)
    for child in children:  # it would wait for the one that has failed
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    errors = "".join(file.read_text() for file in sorted(folder.glob("error-*.txt")))
    assert not failed and not children, errors or "the processes wait for each other"
    return [torch.load(folder / f"result-{rank}.pt", weights_only=False) for rank in range(count)]


def _start(function: Callable[[int], Any], folder: Path, rank: int, count: int, port: int) -> int:
    if child := os.fork():
        return child
    code = 1
    try:
        for state in (AcceleratorState, GradientState, PartialState):
            state._shared_state.clear()
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in (names | OF_AGENT).items()})
        torch.save(function(rank), folder / f"result-{rank}.pt")
        code = 0
    except BaseException:
        (folder / f"error-{rank}.txt").write_text(traceback.format_exc())
    finally:
        os._exit(code)
