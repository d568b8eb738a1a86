"""This file has a clock for the scripts of bench/, and writes their results as JSON with a description of the
machine."""

import json
import platform
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers

RESULTS = Path(__file__).parent / "results"
CUDA = torch.cuda.is_available()


def clock() -> float:
    """Returns the CPU seconds of this process. On a machine with CUDA, `clock` waits for the GPU and returns wall
    seconds."""
    if not CUDA:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def machine() -> dict[str, str | int]:
    names = re.findall("model name.*: (.+)", Path("/proc/cpuinfo").read_text())
    device = torch.cuda.get_device_name() if CUDA else f"CPU, {names[0]}"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"device": device, "threads": torch.get_num_threads(), "python": platform.python_version(), **versions}


def write(name: str, table: dict) -> None:
    text = json.dumps({"machine": machine(), **table}, indent=1, ensure_ascii=False)
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    print(f"{name}\n{text}", flush=True)
