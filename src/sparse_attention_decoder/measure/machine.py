"""The machine a figure was made on: what it is, and how fast it reads memory."""

import os
import platform
import resource
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from sparse_attention_decoder import __version__
from sparse_attention_decoder.kernels.cpu import isa

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def facts(device: str = "cpu") -> dict[str, Any]:
    """Processor, memory, GPU, versions, commit and measured read bandwidth (GB/s), by name."""
    found: dict[str, Any] = {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "sparse_attention_decoder": __version__,
        "kernels": isa(),
        "commit": _commit(),
        "bandwidth_gb_s": round(bandwidth(device), 1),
    }
    return found


def bandwidth(device: str = "cpu", size: int = 1 << 28) -> float:
    """GB/s of reading `size` bytes that no cache holds, all threads together: the best of five readings."""
    values = torch.ones(size // 4, device=device)
    best = float("inf")
    for _ in range(5):
        begun = time.perf_counter()
        # item() waits for a GPU
        values.sum().item()
        best = min(best, time.perf_counter() - begun)
    return size / best / 1e9


def forget_peak() -> bool:
    """Let the peak count from now on; False where the system cannot (outside Linux)."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def peak_bytes() -> int:
    """Most resident memory of this process, since its start or the last `forget_peak`."""
    if _STATUS.exists():
        return _status("VmHWM")
    # kilobytes on Linux and BSD, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def resident_bytes() -> int:
    """Resident memory of this process now; 0 where the system does not tell (outside Linux)."""
    return _status("VmRSS") if _STATUS.exists() else 0


def _status(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str:
    """Short hash of the checkout this package runs from, `+` behind it if files differ; empty outside one."""
    here = ["git", "-C", str(Path(__file__).parent)]
    try:
        hash_ = subprocess.run([*here, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*here, "status", "--porcelain", "."], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return hash_.stdout.strip() + ("+" if changed.stdout.strip() else "")
