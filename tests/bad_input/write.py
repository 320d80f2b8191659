"""Write docs/bad-input.md from the rows: python -m tests.bad_input.write."""

from .table import PAGE, page

if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
