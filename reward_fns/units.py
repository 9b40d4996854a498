r"""Units and words after a number: which are ignored, which change the number, and which units differ.

Ignored are nouns ("7 pens"), units in ``\text{}`` or ``\mathrm{}``, and known units written plainly ("24 cm^2", "24
km/h"). Words for powers of ten belong to the number ("5 million"). Words that change the value in another way ("5
squared", "5 or more", "5 thirds") are not units: such an answer has no number.

Two known units differ unless they are the same unit ("cm" and "centimeters" are); unknown words are not compared.
"""

import re

SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "lakh": 10**5, "crore": 10**7, "trillion": 10**12}
SCALES |= dict.fromkeys(("million", "mn", "mil"), 10**6) | dict.fromkeys(("billion", "bn"), 10**9)
_WORDS_THAT_COUNT = """
squared cubed factorial half halves third thirds fourths fifth fifths sixths sevenths eighths ninths
tenth tenths hundredth hundredths thousandth thousandths millionth millionths and or nor but not to
plus minus times over mod modulo base divided multiplied power root more less fewer most least than
if for when where with is are equals below under above negative short k pi
"""
NOT_UNITS = frozenset(_WORDS_THAT_COUNT.split())
"""Text with one of these words after its number is more than a unit."""

IN_SENTENCES = frozenset({"and", "but", "if", "for", "when", "where", "with", "is", "are"})
"""Words of `NOT_UNITS` that continue the sentence after a number."""

_NAMES = {
    "mm": "millimeter millimeters millimetre millimetres",
    "cm": "centimeter centimeters centimetre centimetres cms",
    "m": "meter meters metre metres",
    "km": "kilometer kilometers kilometre kilometres kms",
    "in": "inch inches",
    "ft": "foot feet",
    "yd": "yard yards yds",
    "mi": "mile miles",
    "mg": "milligram milligrams",
    "g": "gram grams gm gms",
    "kg": "kilogram kilograms kgs",
    "lb": "pound pounds lbs",
    "oz": "ounce ounces",
    "ml": "milliliter milliliters millilitre mL",
    "l": "liter liters litre litres L",
    "gal": "gallon gallons",
    "ms": "millisecond milliseconds",
    "s": "second seconds sec secs",
    "min": "minute minutes mins",
    "h": "hour hours hr hrs",
    "d": "day days",
    "week": "weeks",
    "month": "months",
    "year": "years yr yrs",
    "mph": "",
    "unit": "units",
    "dollar": "dollars USD",
    "cent": "cents",
    "euro": "euros EUR",
    "degree": "degrees deg",
    "rad": "radian radians",
    "percent": "percentage pct",
    "N": "newton newtons",
    "J": "joule joules",
    "W": "watt watts",
    "V": "volt volts",
    "A": "ampere amperes amp amps",
    "Pa": "pascal pascals",
    "Hz": "hertz",
    "K": "kelvin",
    "C": "celsius Celsius",
    "F": "fahrenheit Fahrenheit",
    "mol": "mole moles",
    "am": "a.m. a.m AM",
    "pm": "p.m. p.m PM",
}
KNOWN = {name: unit for unit, names in _NAMES.items() for name in (unit, *names.split())}
_PLAINLY_WRITTEN = [re.escape(name) for name in KNOWN if len(name) > 1 and name.lower() not in ("mi", "am", "pm")]
_PLAIN = "|".join(sorted(_PLAINLY_WRITTEN, key=len, reverse=True))
_POWER = r"(?:\s*\^\s*(?:\{-?[1-9]\}|[1-9])|[²³])?"
_WORDED = r"\\(?:text|mathrm)\s*\{(?:[^{}\\]|\{[^{}\\]*\})*\}"
_TEMPERATURE = r"(?:(?<=\\circ)|(?<=\\circ )|(?<=\\circ\}))[CF](?![a-zA-Z])"
# "m" alone may be a variable, "3 m/s" is a speed.
_RATE = r"(?:(?<=[0-9}] )|(?<=[}]))[mgJNWlL](?=\s*/\s*(?:s|h|kg|mol|K|m|min|L|l)(?![a-zA-Z]))"
_ATOM = rf"(?:{_WORDED}|(?<![a-zA-Z\\])(?:{_PLAIN})(?![a-zA-Z])|{_TEMPERATURE}|{_RATE}){_POWER}"
_NOUN = r"(?<=[0-9})] )(?:[a-zA-Z]{4,}(?: [a-zA-Z]+){0,4}|[a-zA-Z]{2,}(?: [a-zA-Z]{2,}){1,4})"
_JOIN = r"\s*(?:/|\\cdot|\\times)?\s*"
_SUFFIX = re.compile(rf"\s*(?:{_ATOM}(?:{_JOIN}{_ATOM}|\s*/\s*[a-zA-Z]+{_POWER}){{0,3}}|{_NOUN})\s*\.?$")
_UNWRAPPED = re.compile(r"\\(?:text|mathrm)\s*\{((?:[^{}\\]|\{[^{}\\]*\})*)\}")
_WORD = re.compile(r"[a-zA-Z][a-zA-Z.'’-]*")
_OPERATOR_END = re.compile(r"(?:[-+=<>^_/(\[{,;:|&*]|\\[a-zA-Z]*)$")
_PROPER_END = re.compile(r"\\(?:pi|infty|theta|alpha|beta|rangle|circ|%)$|\\%$|\\\}$")


def scale_of(words: str, *, sentence: bool = False) -> int | None:
    """Return the factor of the scale words at the start of `words` (1 if none); None if the words change the number.

    In a `sentence`, only the words directly after the number can change it ("18 because it is ...").
    """
    rest = [word.strip(".-'’").lower() for word in _WORD.findall(words)]
    factor = 1
    while rest and rest[0] in SCALES:
        factor *= SCALES[rest.pop(0)]
    if sentence:
        if re.match(r"\s*and\s+(?:a|one|two|three)\b", words):
            return None
        rest = [word for word in rest[:1] if word not in IN_SENTENCES]
    return None if any(word in NOT_UNITS or word in SCALES for word in rest) else factor


def split_unit(text: str) -> tuple[str, int, str]:
    """Split tidy LaTeX into the part before its unit, the factor of words such as "million", and the unit as written.

    Text without a unit, or with words that are not one, is returned whole.
    """
    match = _SUFFIX.search(text)
    if match is None:
        return text, 1, ""
    value = text[: match.start()].rstrip(" ~")
    if not value or (_OPERATOR_END.search(value) and not _PROPER_END.search(value)):
        return text, 1, ""
    words = _UNWRAPPED.sub(r" \1 ", match[0])
    lone = words.strip()
    factor = None if len(lone) == 1 and lone not in KNOWN else scale_of(words)
    return (text, 1, "") if factor is None else (value, factor, words)


def differ(left: str, right: str) -> bool:
    """Return whether both texts are known units, and not the same one."""
    units = canonical(left), canonical(right)
    return None not in units and units[0] != units[1]


def canonical(text: str) -> tuple[tuple[str, int], ...] | None:
    """Return a unit as sorted names with exponents; None for text that is not made of known units."""
    exponents: dict[str, int] = {}
    sign, power = 1, 1
    text = text.replace("²", "^2").replace("³", "^3").rstrip(" ")
    for word, exponent in re.findall(r"(/|[a-zA-Z][a-zA-Z.]*|[^\sa-zA-Z/^{}\\])\s*(?:\^\s*\{?(-?[1-9])\}?)?", text):
        word = word if word in ("a.m.", "p.m.") else word.rstrip(".")
        lower = word.lower()
        if lower in SCALES:
            continue
        if word == "/" or lower == "per":
            sign = -1
        elif lower in ("square", "sq", "squared"):
            power = 2
        elif lower in ("cubic", "cu"):
            power = 3
        elif word in ("cdot", "times"):
            continue
        else:
            name = KNOWN.get(word) or KNOWN.get(lower)
            if name is None:
                return None
            exponents[name] = exponents.get(name, 0) + sign * power * int(exponent or 1)
            power = 1
    return tuple(sorted(exponents.items())) or None
