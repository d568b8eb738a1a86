"""What the memory benches share: the measured peak of a piece of work, and the machine's name."""

import contextlib
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers
from torch.profiler import ProfilerActivity, profile


@contextlib.contextmanager
def peak_memory() -> Iterator[list[int]]:
    """The most bytes of tensors held at once inside, beyond what stood before, is in the list given, at the end.

    Every allocation counts, also those inside kernels. CPU: the profiler's memory events; CUDA: the allocator's own
    record.
    """
    found: list[int] = []
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield found
        torch.cuda.synchronize()
        found.append(torch.cuda.max_memory_allocated() - before)
        return
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        yield found
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    found.append(peak)


def peak_bytes(work: Callable[[], object]) -> int:
    with peak_memory() as found:
        work()
    return found[0]


def machine() -> dict[str, str | int]:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {names[0] if names else '?'}"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"device": device, "threads": torch.get_num_threads(), "python": platform.python_version(), **versions}
