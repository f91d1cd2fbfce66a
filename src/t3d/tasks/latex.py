r"""Answers as people write them, in LaTeX or plain text, brought to one form before they are compared.

What stands here is what `math-verify` does not know, or ignores: units, bases, times, number words, repeating decimals,
characters beyond ASCII, answers in `\text{}`. Everything is linear in the text's length.
"""

import re
from fractions import Fraction

LONGEST = 2000  # characters of an answer that are still parsed; longer ones must be equal strings

_CHARACTERS = {
    **{"−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "π": r"\pi ", "θ": r"\theta ", "∞": r"\infty "},
    **{"≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "∈": r"\in "},
    **{"ℝ": r"\mathbb{R}", "°": r"^\circ", "²": "^2", "³": "^3", "~": " ", "\u00a0": " ", "\u2009": " "},
    **{"½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}"},
}
_TEXT = r"\\(?:text(?:bf|it|rm|sf|tt)?|mathrm|mathbf|mathit|mbox|operatorname)"
_SAME = [  # what to write instead of what, in this order
    (r"√\{", r"\\sqrt{"),
    (r"√\(([^()]*)\)|√(\w+)", r"\\sqrt{\1\2}"),
    (r"(?<=\d)(?:\{,\}|,\\!|\\[,;:]) ?(?=\d{3})", ","),
    (r"\\[!,;:]|\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])|(?<!\\)\\\s|\\displaystyle|\\q?quad(?![a-z])", " "),
    (r"\\(?:lbrace|rbrace)(?![a-z])", lambda m: "\\{" if m[0] == "\\lbrace" else "\\}"),
    (r"\\(?:langle|rangle)(?![a-z])", lambda m: "(" if m[0] == "\\langle" else ")"),
    (r"\\(le|ge|ne)q(?:slant)?(?![a-z])", r"\\\1"),
    (r"\\varnothing", r"\\emptyset"),
    (r"\\degree(?![a-z])|\^\{?" + _TEXT + r"\{o\}\}?|\^\{\s*\\circ\s*\}", r"^\\circ"),
    (r"\\mathrm\{([ie])\}", r"\1"),
    (_TEXT + r"\{\s*\\?\$\s*\}", r"\\$"),
    (r"\\[lc]?dots[bcimo]?(?![a-z])|\.\.\.+|…", r"\\ldots "),
    (r"\s+", " "),
]
_SAME = [(re.compile(pattern), instead) for pattern, instead in _SAME]
_WHOLE = re.compile(_TEXT + r"\{([^{}]*)\}\.?")
_WRAPPED = re.compile(_TEXT + r"\{([^{}]*)\}")
_BEFORE = re.compile(_TEXT + r"\{[^{}]*(?:\bis|:|=)\s*\}\s*|[a-zA-Z]\s*\\in(?![a-z])\s*")
_BUILDER = re.compile(r"\\\{\s*([a-zA-Z])\s*(?:\\mid|\\vert|:|\|)\s*(.*)\\\}")
_SPACED = re.compile(r"[-+]?\d{1,3}(?: \d{3})+(?:\.\d+)?")
_PLAIN = re.compile(r"([-+]?)(?:\\?\$)?((?:\d{1,3}(?:,\d{3})+|\d{1,60})(?:\.\d{0,60})?|\.\d{1,60})(e[-+]?\d\d?)?")
_RATIO = re.compile(r"([-+]?\d{1,60})/(\d{1,60})")
_REPEATING = re.compile(r"(-?)(\d{0,30})\.(\d{0,30})\\overline\{?(\d{1,30})\}?")
_BASED = re.compile(r"\(?([0-9A-Za-z]+)\)?_\{?(?:(\d+)|" + _TEXT + r"\{([a-z]+)\})\}?")
_TIME = re.compile(r"0?(\d{1,2}):([0-5]\d)(?:\s.*)?")
_WORDS = re.compile(r"[A-Z]{2,}|[A-Za-z]{3,}(?: [A-Za-z]+)*")
_MIXED = re.compile(r"([-+]?\d{1,60}) (\d{1,60})/(\d{1,60})")
_INEQUALITY = re.compile(r"([a-zA-Z])\s*(<|>|\\leq?(?![a-z])|\\geq?(?![a-z]))\s*([^<>]+)")

_DOTS = r"\\ldots"
_CONDITION = r"(?i:\b(?:if|when|where|for|all|any|every|each|some|such|that|only|except|otherwise|unless|with|not)\b)"
_WORDED = r"(?<![_^])(?<![_^]\{)" + _TEXT + r"\{(?!\s*(?:and|or|[a-zA-Z])\s*\})[^{}]*[a-zA-Z][^{}]*\}"
_UNCLEAR = re.compile(rf"{_DOTS}|{_CONDITION}|{_WORDED}(?!(?:\^\{{?\d\}}?)?\s*(?:$|=))")

_SAME_UNIT = """mm millimeter millimetre; cm centimeter centimetre; m meter metre; km kilometer kilometre;
in inch inche; ft foot feet; yd yard; mi mile; mg milligram; g gram; kg kilogram; oz ounce; lb pound;
s sec second; min minute; h hr hour; day; week; month; year; cent; dollar usd; euro; degree; radian; percent; am; pm"""
_UNIT_OF = {word: group.split()[0] for group in _SAME_UNIT.split(";") for word in group.split()}
_UNIT_AT_END = re.compile(_TEXT + r"\{([^{}]*)\}(?:\^\{?\d\}?)?\s*$|(?<=\d)\s*([a-z. ]+)$", re.IGNORECASE)
_UNITS = re.compile(r"(.*\d)\s*(?<![a-z])([a-z][a-z. ]*)", re.IGNORECASE)
_SHORT = {"a", "of", "in", "sq", "cu", "per", *_UNIT_OF}  # words of a unit that are no variables
_NO_UNITS = {"pi", "sqrt", "sin", "cos", "tan", "cot", "sec", "csc", "log", "exp", "theta", "alpha", "beta"}
_NO_UNITS |= {"infinity", "choose", "mod", "and", "not", "percent"}
_POWERS = {"dozen": 12, "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_MULTIPLE = re.compile(rf"(.*\d)\s*(?:{_TEXT}\{{)?\s*({'|'.join(_POWERS)})s?\b[a-z ]*\}}?", re.IGNORECASE)
_NUMBER_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_NUMBER_WORDS += ["eleven", "twelve"]
_BASE_WORDS = {word: str(i) for i, word in enumerate(_NUMBER_WORDS)} | {"sixteen": "16"}
_SAID = {word: str(i) for i, word in enumerate(_NUMBER_WORDS)} | {
    "all real numbers": r"\mathbb{R}",
    "no solution": r"\emptyset",
    "no solutions": r"\emptyset",
    "empty set": r"\emptyset",
    "infinity": r"\infty",
}


def normal(text: str) -> str:
    """`text` without what never matters: dollars around it, spacing commands, a final stop, a unit in words."""
    text = text[: LONGEST * 10].strip().removeprefix("$").removesuffix("$")
    text = "".join(_CHARACTERS.get(c, c) for c in text)
    for pattern, instead in _SAME:
        text = pattern.sub(instead, text)
    text = text.strip().rstrip(".").strip()
    if len(text) > LONGEST:
        return text
    if whole := _WHOLE.fullmatch(text):
        text = whole[1].strip().rstrip(".")
        text = re.sub(r"(?<=\d) and (?=[-+]?\d)", ", ", text)
    text = _SAID.get(text.lower(), text)
    text = _BEFORE.sub("", text, count=1) if _BEFORE.match(text) else text
    if builder := _BUILDER.fullmatch(text):
        text = builder[2].strip()
    if _SPACED.fullmatch(text):
        return text.replace(" ", "")
    if mixed := _MIXED.fullmatch(text):
        return rf"{mixed[1]}\frac{{{mixed[2]}}}{{{mixed[3]}}}"
    if based := _BASED.fullmatch(text):
        base = based[2] or _BASE_WORDS.get(based[3])
        return f"{based[1]}_{{{base}}}" if base else text
    if multiple := _MULTIPLE.fullmatch(text):
        value = number(multiple[1])
        return text if value is None else str(value * _POWERS[multiple[2].lower()])
    if (measured := _UNITS.fullmatch(text)) and _is_unit(measured[2]):
        text = measured[1].strip()
    repeating = _REPEATING.fullmatch(text)
    return str(_repeating(*repeating.groups())) if repeating else text


def words(text: str) -> str:
    r"""`text` as someone would read it out: without `\text{}`, spaces, and brackets around single letters.

    Case counts only where nothing is in words, as in `r` and `R`.
    """
    said = _WRAPPED.sub(lambda m: m[1], text)
    bare = re.sub(r"\(([A-Z])\)", r"\1", re.sub(r"[\s.]+$|(?<!\d)\s+|\s+(?!\d)", "", said))
    bare = re.sub(r"([_^]|\\pmod)\{(\d+|[a-zA-Z])\}(?!\w)", r"\1\2", bare)
    return bare.casefold() if said != text or _WORDS.fullmatch(said) else bare


def number(text: str) -> Fraction | None:
    """The value of a plain decimal or a fraction of integers, thousands commas allowed; None for anything else."""
    if match := _PLAIN.fullmatch(text):
        return Fraction("".join(match.groups("")).replace(",", ""))
    if (match := _RATIO.fullmatch(text)) and int(match[2]):
        return Fraction(int(match[1]), int(match[2]))
    return None


def differing_units(answer: str, gold: str) -> bool:
    """Whether both end in a unit that we know, and not in the same."""
    return len({_unit(answer), _unit(gold)} - {None}) == 2


def differ(answer: str, gold: str) -> bool:
    """Whether two texts in normal form, not the same as words, differ in what math-verify might not see: numerals in
    bases, times, words (which it takes for products of variables)."""
    if all(_WORDS.fullmatch(text) for text in (answer, gold)):
        return True
    pairs = [[pattern.fullmatch(text) for text in (answer, gold)] for pattern in (_BASED, _TIME)]
    return any(a and b and a.groups() != b.groups() for a, b in pairs) or (
        bool(pairs[1][1]) and re.fullmatch(r"\d+:\d+", answer) is not None and not pairs[1][0]
    )


def unclear(text: str) -> bool:
    r"""Whether a text in normal form holds what a parser of formulas drops, or takes for letters: dots, conditions and
    words (but `and`, `or`, in an index, or a unit at the end)."""
    return _UNCLEAR.search(text) is not None


def as_intervals(gold: str, answer: str) -> tuple[str, str]:
    r"""`x < 1 \text{ or } x > 2` as a union of intervals, where the other one is in intervals."""
    both = [gold, answer]
    for i, text in enumerate(both):
        parts = re.split(_TEXT + r"\{\s*or\s*\}|\bor\b|\\cup", text)
        if len(parts) > 1 and re.search(r"\\cup|\\infty", both[1 - i]):
            found = [_INEQUALITY.fullmatch(part.strip()) for part in parts]
            if all(found) and len({m[1] for m in found}) == 1:
                both[i] = r"\cup".join(_interval(m[2], m[3].strip()) for m in found)
    return both[0], both[1]


def _interval(sign: str, end: str) -> str:
    if sign == "<" or sign.startswith(r"\l"):
        return rf"(-\infty,{end}" + (")" if sign == "<" else "]")
    return ("(" if sign == ">" else "[") + rf"{end},\infty)"


def _unit(text: str) -> str | None:
    """The unit that ends an answer (`5\\text{ cm}^2`, `18 dollars`), in one spelling; None if there is none we know."""
    if text.lstrip("$ ").startswith("\\$"):
        return "dollar"
    match = _UNIT_AT_END.search(text[-100:].rstrip(". $"))
    found = (match[1] or match[2] or "").lower().replace(".", "").split() if match else []
    return next((_UNIT_OF[w] for word in found for w in (word, word.removesuffix("s")) if w in _UNIT_OF), None)


def _is_unit(text: str) -> bool:
    """Whether words after a number only say what is counted: no variables, functions or constants."""
    found = text.lower().replace(".", "").split()
    return all(word in _SHORT or (len(word) > 2 and word not in _NO_UNITS) for word in found)


def _repeating(sign: str, whole: str, fixed: str, cycle: str) -> Fraction:
    """The value of `whole.fixed` followed by `cycle` for ever."""
    value = int(whole + fixed + cycle) - int(whole + fixed or 0)
    return Fraction(-value if sign else value, 10 ** len(fixed) * (10 ** len(cycle) - 1))
