"""Whether a cache fits, told before anything is allocated."""

import math
import pathlib

import jax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from huatuo_jax.backbone.config import BackboneConfig
from huatuo_jax.generation import cache as caches

_GIGA = 1e9


def check_fits(
    cfg: BackboneConfig,
    *,
    slots: int,
    prefix_rows: int,
    max_length: int,
    page_size: int,
    pages: tuple[int, ...],
    dtype: DTypeLike,
    mesh: Mesh | None,
    memory_bytes: int | None,
) -> None:
    """Raise ValueError where the cache is larger than the memory that is free.

    Args:
        cfg: the backbone.
        slots: rows of the cache, in the worst case of `max_length` each.
        prefix_rows: rows of the prefix cache.
        max_length: positions of a row at most.
        page_size: positions of a page.
        pages: the cache's buckets; while it grows into the last, the one before is there too.
        dtype: of keys and values.
        mesh: the devices that share it; None for one.
        memory_bytes: free memory of all devices together; None asks the devices.
    """
    page = caches.num_bytes(cfg, positions=page_size, dtype=dtype)
    prefix = prefix_rows * -(-max_length // page_size) * page
    slot = page * sum(pages[-2:]) / slots
    needed = slots * slot + prefix
    free = _free_bytes(mesh) if memory_bytes is None else memory_bytes
    if needed > free:
        fitting = max(math.floor((free - prefix) / slot), 0)
        raise ValueError(
            f"slots={slots} of max_length={max_length} tokens need {needed / _GIGA:.3g} GB of "
            f"cache, {free / _GIGA:.3g} GB are free: {fitting} slots of that length would fit; "
            "use fewer slots or a smaller max_length"
        )


def _free_bytes(mesh: Mesh | None) -> float:
    """What the devices say is free; on CPU, what the machine has left."""
    devices = [jax.devices()[0]] if mesh is None else list(mesh.devices.flat)
    local = [device for device in devices if device.process_index == jax.process_index()]
    if local[0].platform == "cpu":
        return _free_host_bytes()  # All virtual devices share it.
    statistics = [device.memory_stats() for device in local]
    if any(one is None or "bytes_limit" not in one for one in statistics):
        return math.inf
    least = min(one["bytes_limit"] - one["bytes_in_use"] for one in statistics)
    return float(least * len(devices))


def _free_host_bytes() -> float:
    table = pathlib.Path("/proc/meminfo")
    if not table.is_file():  # Not Linux: nothing is known.
        return math.inf
    for line in table.read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return float(value.split()[0]) * 1024
    return math.inf
