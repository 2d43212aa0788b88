"""Numbers for a reader, in units of their size: what is not 0 does not look like it."""

from huatuo_jax.training.programs import GIB

_COUNTS = ((1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k"))
_SECONDS = ((1.0, " s"), (1e-3, " ms"), (1e-6, " us"), (1e-9, " ns"))
_BYTES = ((float(GIB), " GiB"), (float(1 << 20), " MiB"), (float(1 << 10), " KiB"), (1.0, " B"))


def count(number: float) -> str:
    """FLOPs and the like: `1.2 T`, `34 G`."""
    return _scaled(number, _COUNTS, otherwise=f"{number:.3g}")


def duration(seconds: float) -> str:
    """`12.3 s`, `45 us`."""
    return _scaled(seconds, _SECONDS, otherwise=f"{seconds:.3g} s")


def size(num_bytes: float) -> str:
    """`1.2 GiB`, `34 MiB`."""
    return _scaled(num_bytes, _BYTES, otherwise=f"{num_bytes:.3g} B")


def gib(num_bytes: float) -> str:
    """Bytes as a number of GiB, `1.20`, for sums that have the unit once."""
    number = num_bytes / GIB
    return f"{number:.2f}" if number >= 0.005 or not number else f"{number:.1g}"


def share(part: float) -> str:
    """`45%`, `0.12%`."""
    return f"{part:.0%}" if part >= 0.1 or not part else f"{100 * part:.2g}%"


def rate(number: float) -> str:
    """Something a second: `12,345`, `0.12`."""
    return f"{number:,.0f}" if number >= 10 or not number else f"{number:.2g}"


def _scaled(number: float, units: tuple[tuple[float, str], ...], *, otherwise: str) -> str:
    """In the largest unit that gives at least 1."""
    for one, name in units:
        if abs(number) >= one:
            return f"{number / one:.3g}{name}"
    return otherwise
