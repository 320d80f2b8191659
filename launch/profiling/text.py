"""A timeline in letters, for a terminal."""

from collections.abc import Mapping

from headrace.pipeline import Timeline
from headrace.pipeline.timeline import WORKING, Work

__all__ = ["LEGEND", "timeline_text", "timelines_text"]

LETTERS = {
    Work.FORWARD: "F",
    Work.BACKWARD: "B",
    Work.UPDATE: "u",
    Work.LEARN: "l",
    Work.WAIT: ".",
    Work.DATA: "d",
}

LEGEND = """\
F forward, B backward, u update, l learning of a synthesizer, . waiting for a neighbour,
d waiting for data, blank: the engine; at the right the share of the time at work"""


def timeline_text(timeline: Timeline, width: int = 72) -> str:
    """A row a stage, each letter what most of its moment went to; then a scale in milliseconds."""
    seconds = timeline.seconds
    rows = []
    for j, spans in enumerate(timeline.stages):
        cells = [{} for _ in range(width)]  # type: list[dict[str, float]]
        for span in spans:
            letter = LETTERS.get(span.work)
            if letter is None or not seconds:
                continue
            a, b = width * span.start / seconds, width * span.end / seconds
            for k in range(int(a), min(width, int(b) + 1)):
                part = min(b, k + 1) - max(a, k)
                if part > 1e-6:  # and not the rounding of a span that ends where a letter does
                    cells[k][letter] = cells[k].get(letter, 0.0) + part
        text = "".join(max(cell, key=lambda c: cell[c]) if cell else " " for cell in cells)
        rows.append(f"stage {j:<3} |{text}| {timeline.share(j, *WORKING):.0%}")
    end = f"{1e3 * seconds:.1f} ms".rjust(width - 1)
    return "\n".join([*rows, f"{'':9} 0 {end}"])


def timelines_text(timelines: Mapping[str, Timeline], width: int = 72) -> str:
    """Several, one below the other on one time scale."""
    longest = max(t.seconds for t in timelines.values())
    parts = []
    for name, timeline in timelines.items():
        share = timeline.seconds / longest if longest else 1.0
        parts.append(f"{name}\n{timeline_text(timeline, max(1, round(width * share)))}")
    return "\n\n".join([*parts, LEGEND])
