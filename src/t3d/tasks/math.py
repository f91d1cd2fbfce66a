"""Checking mathematical answers."""

import re


def last_boxed(text: str) -> str | None:
    r"""The content of the last complete `\boxed{...}`, or None. Braces may nest."""
    start = text.rfind("\\boxed{")
    while start >= 0:
        depth = 0
        for end in range(start + len("\\boxed"), len(text)):
            depth += (text[end] == "{") - (text[end] == "}")
            if depth == 0:
                return text[start + len("\\boxed{") : end]
        start = text.rfind("\\boxed{", 0, start)
    return None


def verify_math(response: str, reference: str) -> bool:
    """Whether the final answer of `response` equals `reference`."""
    answer = last_boxed(response)
    if answer is None:
        return False
    answer, reference = answer.strip(), reference.strip()
    if answer == reference:
        return True
    if re.fullmatch(r"-?\d+", answer) and re.fullmatch(r"-?\d+", reference):
        return int(answer) == int(reference)
    from math_verify import parse, verify

    return verify(parse(f"${reference}$"), parse(f"\\boxed{{{answer}}}"))
