"""This file has the vocabulary of answers: tables of characters, commands, names, words and units, and a function
that unifies the spelling of units.

A LaTeX command that is in no table of this file makes an answer unreadable.
"""

import re

from .tree import FUNCTIONS, word_set

# Each Unicode character is replaced by ASCII or LaTeX.
CHARACTERS = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "×": "\\times ", "·": "\\cdot ", "⋅": "\\cdot ", "∙": "\\cdot ",
    "∗": "*", "÷": "\\div ", "∕": "/", "⁄": "/", "√": "\\sqrt ", "∛": "\\sqrt[3]", "∜": "\\sqrt[4]",
    "º": "\\degree ", "≤": "\\le ", "⩽": "\\le ", "≥": "\\ge ", "⩾": "\\ge ", "≠": "\\ne ", "ℝ": "\\mathbb{R}",
    "ℤ": "\\mathbb{Z}", "ℕ": "\\mathbb{N}", "ℚ": "\\mathbb{Q}", "ℂ": "\\mathbb{C}", "⟨": "\\langle ",
    "⟩": "\\rangle ", "〈": "\\langle ", "〉": "\\rangle ", "′": "'", "’": "'", "‘": "'", "″": "''", "“": '"',
    "”": '"', "⋯": "\\ldots ", "（": "(", "）": ")", "［": "[", "］": "]", "，": ",", "、": ",", "；": ";",
    "：": ":", "。": ".", "％": "%", "＝": "=", "＋": "+", "－": "-", "＜": "<", "＞": ">", "∶": ":", "⇒": "\\to ",
    "ı": "i", "ℏ": "\\hbar ", "∑": "\\sum ", "∏": "\\prod ", "∫": "\\int ", "½": "\\frac{1}{2}", "⅓": "\\frac{1}{3}",
    "⅔": "\\frac{2}{3}", "¼": "\\frac{1}{4}", "¾": "\\frac{3}{4}", "⅕": "\\frac{1}{5}", "⅙": "\\frac{1}{6}",
    "⅛": "\\frac{1}{8}", "⅜": "\\frac{3}{8}", "⅝": "\\frac{5}{8}", "⅞": "\\frac{7}{8}", "¢": "\\text{ cents}",
    "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u200b": "", "\ufeff": "", "𝑖": "i", "∠": "\\angle ",
    "△": "\\triangle ", "∣": "|", "ϵ": "\\epsilon ", "ϕ": "\\phi ", "µ": "\\mu ",
}  # fmt: skip
_GREEK = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau upsilon phi chi psi "
    "omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega"
)
GREEK = dict(zip(_GREEK.split(), "αβγδεζηθικλμνξπρστυφχψωΓΔΘΛΞΠΣΥΦΨΩ", strict=True))

# Each LaTeX command or plain word is replaced by a symbol.
NAMED = GREEK | {"var" + name: GREEK[name] for name in ("epsilon", "theta", "pi", "rho", "sigma", "phi")}
_NAMES_OF_SYMBOLS = {
    "∞": "infty infinity infin inf oo", "…": "ldots dots cdots dotsc dotsb vdots ddots", "°": "degree", "ħ": "hbar",
    "ℓ": "ell", "∂": "partial", "℧": "mho", "i": "imath", "j": "jmath", "ℵ": "aleph", "∇": "nabla", "℘": "wp",
    "Re": "Re", "Im": "Im", "☉": "odot", "⊕": "oplus", "⊗": "otimes", "†": "dagger", "⋆": "star", "∀": "forall",
    "∃": "exists", "∴": "therefore", "□": "Box square", "·": "cdotp",
}  # fmt: skip
NAMED |= {name: symbol for symbol, names in _NAMES_OF_SYMBOLS.items() for name in names.split()}
_NAMES_OF_OPERATORS = {
    "*": "cdot times ast", "/": "div", "±": "pm", "∓": "mp", "mod": "mod bmod", "pmod": "pmod", "choose": "choose",
    "<=": "le leq leqslant", ">=": "ge geq geqslant", "!=": "ne neq", "<": "lt", ">": "gt", "≈": "approx simeq",
    "≡": "equiv", "~": "sim", "≅": "cong", "∝": "propto", "→": "to rightarrow Rightarrow implies mapsto", "⊥": "perp",
    "∥": "parallel", "∈": "in", "∉": "notin", "⊂": "subset", "⊆": "subseteq", "∅": "emptyset varnothing",
    "∪": "cup bigcup", "∩": "cap", "∖": "setminus backslash", "and": "land wedge", "or": "lor vee",
    "|": "mid vert lvert rvert Vert", "⌊": "lfloor", "⌋": "rfloor", "⌈": "lceil", "⌉": "rceil", "(": "langle",
    ")": "rangle", "[": "lbrack", "]": "rbrack", "\\{": "lbrace", "\\}": "rbrace", ":": "colon", "'": "prime",
    "∘": "circ", "£": "pounds", "€": "euro", "¥": "yen", "\\\\": "newline",
}  # fmt: skip
OPERATORS = {name: operator for operator, names in _NAMES_OF_OPERATORS.items() for name in names.split()}
_NAMES = {letter: name for name, letter in GREEK.items()} | _NAMES_OF_SYMBOLS | _NAMES_OF_OPERATORS
CHARACTERS = {sign: f"\\{names.split()[0]} " for sign, names in _NAMES.items() if not sign.isascii()} | CHARACTERS
SPACING = word_set(
    "left right big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr displaystyle textstyle "
    "scriptstyle limits nolimits quad qquad thinspace enspace hspace hfill space normalsize large Large small "
    "tiny bf rm it ensuremath middle mathop"
)
FONTS = word_set(
    "textbf mathbf boldsymbol bm mathit textit emph underline boxed fbox mathsf textsf cancel bcancel pmb "
    "mathnormal texttt mathtt textsc"
)
TEXTS = {"text", "mathrm", "mbox", "textrm", "textnormal", "operatorname", "hbox", "rm", "textup"}
ACCENTS = word_set("overline bar hat vec dot ddot tilde widehat widetilde overrightarrow mathcal mathfrak mathscr")

STOP_WORDS = word_set(
    "or and any if when where for not no never mod except than with without is are isnt isn't arent aren't to base "
    "more less most least fewer over under above below about approximately nearly almost roughly between until up "
    "either neither nor but unless wrong false incorrect negative plus minus half halves thirds fifths tenths "
    "hundredths thousandths factorial choose modulo remainder inverse"
)
SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
SHORT_WORDS = word_set("yes no odd all any none one two six ten red sun mon tue wed thu fri sat max min dne")

_UNITS = {
    "cm": "centimeter centimetre", "mm": "millimeter millimetre", "km": "kilometer kilometre", "m": "meter metre",
    "in": "inch inche", "ft": "foot feet", "yd": "yard", "mi": "mile", "kg": "kilogram kilo", "g": "gram gm",
    "mg": "milligram", "lb": "pound", "oz": "ounce", "L": "liter litre l", "mL": "milliliter millilitre ml",
    "s": "second sec", "min": "minute", "h": "hour hr", "day": "day", "week": "week wk", "month": "month",
    "year": "year yr", "degree": "degree deg", "%": "percent pct percentage", "cent": "cent ¢",
    "$": "dollar buck usd", "€": "euro eur", "unit": "unit", "N": "newton", "J": "joule", "W": "watt", "V": "volt",
    "A": "ampere amp", "K": "kelvin", "Pa": "pascal", "Hz": "hertz", "rad": "radian", "C": "celsius",
    "F": "fahrenheit",
}  # fmt: skip
_SPELLINGS = {long: short for short, names in _UNITS.items() for long in [short, *names.split()]}


def unit_name(words: str) -> str:
    """Returns one spelling for all spellings of a unit: "square inches" and "in^2" give the same string, "cm" and "m"
    do not."""
    words = re.sub(
        r"(square|sq|cubic|cu)\b\.?\s*([A-Za-z]+)", lambda m: f"{m[2]}^{2 if m[1][0] == 's' else 3}", words
    )
    words = re.sub(r"\bsquared\b", "^2", re.sub(r"\bcubed\b", "^3", words))
    words = words.replace(" per ", "/").replace("·", " ").replace(".", "")
    # the unit "m s^-1" becomes "m/s"
    words = re.sub(r"\s*([A-Za-z]+)\s*\^\s*\{?-(\d)\}?", r"/\1^\2", words).replace("^1", "")
    return re.sub(r"[\s{}]+", "", re.sub(r"[A-Za-z%$¢]+", _one_unit, words)).replace("mi/h", "mph")


def _one_unit(match: re.Match) -> str:
    word = match.group()
    if word in _SPELLINGS:
        return _SPELLINGS[word]
    word = word.lower()
    single = word[:-1] if word.endswith("s") and len(word) > 2 else word
    return _SPELLINGS.get(word) or _SPELLINGS.get(single) or single


FUNCTION_NAMES = FUNCTIONS - {"!", "!!", "root", "abs", "floor", "ceil", "mod", "binom"}
FUNCTION_NAMES |= {"log", "lg", "exp", "cis"}
ALIASES = {"asin": "arcsin", "acos": "arccos", "atan": "arctan", "tg": "tan", "ctg": "cot"}
COMMANDS = word_set("sqrt binom begin end sum prod int lim angle triangle measuredangle mathbb") | ACCENTS
COMMANDS |= {"frac", "dfrac", "tfrac", "cfrac", "dbinom", "tbinom"}
MATRICES = "pmatrix|bmatrix|matrix|smallmatrix|Bmatrix|vmatrix|array"
LISTS = "aligned|align|cases|gathered|split"
KNOWN = set(NAMED) | set(OPERATORS) | SPACING | FONTS | TEXTS | COMMANDS | FUNCTION_NAMES | set(ALIASES)
# Each of these words is a unit if it follows a number, even without \\text.
SHORT_UNITS = word_set(
    "cm mm km in ft yd mi kg mg lb lbs oz mL ml dL dl cL cl gal mol min sec hr hrs wk wks yr yrs deg rad pct mph kph "
    "rpm kHz MHz GHz kWh men sq cu per"
)
CURRENCIES = {"USD": "$", "EUR": "€", "GBP": "£"}
