"""One way to give something that cannot work, and what is said of it."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

__all__ = ["Row"]


@dataclass(frozen=True)
class Row:
    """A row of docs/bad-input.md.

    Args:
        what: was given, in a few words of Markdown.
        message: what is said, whole; "…" stands for anything.
        code: the exit code of a command, or the exception's type in Python.
        command: "train" …; "" is Python, or a function that a command's test calls.
        arguments: of the command, in words, after `--config tiny.yaml` where there is a file.
        act: of Python: raises.
        files: by name, what lies in the folder beside `tiny.yaml`; None makes it a folder.
        ranks: how many processes torchrun would have started; 0: none did.
        config: whether `--config tiny.yaml` goes first.
    """

    what: str
    message: str
    code: int | type[Exception] = 2
    command: str = ""
    arguments: str = ""
    act: Callable[[], object] | None = None
    files: Mapping[str, str | None] = field(default_factory=dict)
    ranks: int = 0
    config: bool = True

    @property
    def pattern(self) -> "re.Pattern[str]":
        """What the message must be."""
        return re.compile(".*".join(map(re.escape, self.message.split("…"))))

    @property
    def cells(self) -> tuple[str, str, str]:
        """What, message and code, as the table has them."""
        where = f"`{self.command}` " if self.command else ""
        code = str(self.code) if isinstance(self.code, int) else f"`{self.code.__name__}`"
        tick = "``" if "`" in self.message else "`"
        return where + self.what, f"{tick}{self.message}{tick}", code
