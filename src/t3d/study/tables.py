"""Markdown tables."""


def line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def head(*cells: str, text: int = 1) -> list[str]:
    """The two lines that begin a table; the first `text` columns are to the left, numbers to the right."""
    return [line(*cells), line(*("---" if number < text else "---:" for number in range(len(cells))))]
