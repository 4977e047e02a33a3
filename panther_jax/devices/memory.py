"""Memory of the host and of devices, as far as a container or a device allows."""

from pathlib import Path
from typing import Any

# -------------------------------------------------------------------------------------- memory


def available_memory() -> int | None:
    """Bytes of memory that a process can have: of the machine, or of its container."""
    limits = []
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(1024 * int(line.split()[1]))
        limit, stat = (Path(f"/sys/fs/cgroup/memory.{n}").read_text() for n in ("max", "stat"))
        if limit.strip() != "max":
            used = dict(line.split() for line in stat.splitlines())["anon"]  # caches make room
            limits.append(int(limit) - int(used))
    except (OSError, ValueError, KeyError):
        pass  # another system, or an older kind of group: what was found so far counts
    return min(limits) if limits else None


def memory_limit(device: Any) -> int | None:
    """Bytes of memory that arrays on an accelerator can have in all; None where not known."""
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return None if limit is None else int(limit)


def free_memory(device: Any) -> int | None:
    """Free bytes of a device, of the machine for a CPU; None where it is not known."""
    limit = memory_limit(device)
    if limit is not None:
        return limit - int((device.memory_stats() or {}).get("bytes_in_use", 0))
    return available_memory() if device.platform == "cpu" else None
