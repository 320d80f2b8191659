"""matplotlib for every picture: into files, the same bytes every time, one look."""

from pathlib import Path
from typing import Any

from .data.checks import import_extra

__all__ = ["clean", "import_pyplot", "save"]


def import_pyplot(extra: str = "profile", user: str = "drawing") -> Any:
    """matplotlib's pyplot, which needs no display.

    Args:
        extra: the one of Headrace's extras that brings it to this user.

    Raises:
        ImportError: matplotlib is not installed.
    """
    matplotlib = import_extra("matplotlib", extra=extra, user=user)
    matplotlib.use("Agg")
    matplotlib.rcParams.update(
        {"svg.fonttype": "none", "svg.hashsalt": "headrace", "font.size": 10}
    )
    return import_extra("matplotlib.pyplot", extra=extra, user=user)


def clean(ax: Any) -> None:
    """No frame, and a grid behind what is drawn."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(True, color="#EEEEEE", linewidth=0.8)
    ax.set_axisbelow(True)


def save(fig: Any, stem: Path) -> list[Path]:
    """Write a figure as PNG and SVG, and let it go; gives the files."""
    paths = [stem.with_suffix(".png"), stem.with_suffix(".svg")]
    fig.savefig(paths[0], dpi=150)
    fig.savefig(paths[1], metadata={"Date": None})
    import_pyplot().close(fig)
    return paths
