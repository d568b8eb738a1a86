"""What the benches share: a clock, peak memory, and results as JSON with a description of the machine."""

import json
import platform
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers
from torch.profiler import ProfilerActivity, profile

RESULTS = Path(__file__).parent / "results"
CUDA = torch.cuda.is_available()


def clock() -> float:
    """Returns CPU seconds of this process; on CUDA wall seconds, after waiting for the GPU."""
    if not CUDA:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def peak_bytes(work: Callable[[], object]) -> int:
    """Returns the most bytes of tensors that `work` holds at once, beyond those that existed before.

    Every allocation counts, also those inside kernels. On a CPU the profiler's memory events are used, on CUDA the
    allocator's own record.
    """
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        work()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def machine() -> dict[str, str | int]:
    names = re.findall("model name.*: (.+)", Path("/proc/cpuinfo").read_text())
    device = torch.cuda.get_device_name() if CUDA else f"CPU, {names[0]}"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"device": device, "threads": torch.get_num_threads(), "python": platform.python_version(), **versions}


def write(name: str, table: dict) -> None:
    text = json.dumps({"machine": machine(), **table}, indent=1, ensure_ascii=False)
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    print(f"{name}\n{text}", flush=True)
