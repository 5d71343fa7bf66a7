"""How many bytes an arena may take on this machine, asked before anything is allocated."""

import os
from pathlib import Path


def available_memory(root="/"):
    """Bytes that can be had without swapping: the machine's, or its control group's if that allows less.

    On Linux ``MemAvailable`` and the limits of every enclosing control group (versions 1 and 2); elsewhere
    the physical memory. `root` is where ``proc`` and ``sys`` are found.
    """
    root = Path(root)
    meminfo = _fields(root / "proc/meminfo")
    if "MemAvailable:" in meminfo:
        machine = meminfo["MemAvailable:"] * 1024
    else:
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(0, min([machine, *_cgroup_room(root)]))


def ensure_available(size, available):
    """Raise MemoryError, carrying both numbers, when `size` bytes are more than `available`."""
    if size > available:
        error = MemoryError(f"an arena of {size} bytes does not fit into the {available} that are available")
        error.bytes_needed, error.bytes_available = size, available
        raise error


def _cgroup_room(root):
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            mount, limit, usage = "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            mount, limit, usage = "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        mount = root / mount
        inside = mount / group.lstrip("/")
        for folder in (inside, *inside.parents):
            most, used = _text(folder / limit).strip(), _text(folder / usage).strip()
            if most.isdigit() and used.isdigit():
                yield int(most) - int(used) + _reclaimable(folder)
            if folder == mount:
                break


def _reclaimable(folder):
    fields = _fields(folder / "memory.stat")
    return fields.get("total_inactive_file", fields.get("inactive_file", 0))


def _fields(path):
    lines = (line.split() for line in _text(path).splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}


def _text(path):
    try:
        return path.read_text()
    except OSError:
        return ""
