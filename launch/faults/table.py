"""How many faults of each kind were survived."""

from collections import Counter
from collections.abc import Sequence
from statistics import median

from .trials import Row

__all__ = ["table"]


def table(rows: Sequence[Row], lost: Sequence[str], seconds: float) -> str:
    """A line for each kind of fault, as Markdown."""
    lines = ["| fault | times | survived | seconds, median | most | in jobs |"]
    lines.append("|---|--:|--:|--:|--:|---|")
    for what in dict.fromkeys(sorted(row.what for row in rows)):
        own = [row for row in rows if row.what == what]
        took = [row.seconds for row in own]
        well = sum(not row.lost for row in own)
        times = Counter(sorted(row.workload for row in own))
        where = ", ".join(f"{name} {many}" for name, many in times.items())
        seconds_of = f"{median(took):.1f} | {max(took):.1f}"
        lines.append(f"| {what} | {len(own)} | {well} | {seconds_of} | {where} |")
    jobs = len({row.job for row in rows})
    well = sum(not row.lost for row in rows)
    lines.append(f"| all, in {jobs} jobs, {seconds / 60:.0f} min | {len(rows)} | {well} | | | |")
    return "\n".join([*lines, *(f"lost: {each}" for each in lost)])
