"""Cuts an answer into tokens: cleans the text, spells what means the same in one way, knows the commands.

A token is (kind, value): NUM digits, NAME a variable or constant, FUNC a function, TEXT words, COMMAND what takes
arguments, BEGIN and END_ENV of matrices, REL a relation, SEP what separates the items of a list, CURRENCY, OP the rest.
The first half is vocabulary. A command that is not in it makes an answer unreadable.
"""

import regex

from answer_nodes import FUNCTIONS, Unreadable

MAX_CHARS, MAX_TOKENS = 2_000, 700

# Unicode and the ASCII or LaTeX it stands for.
CHARACTERS = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "×": "\\times ", "·": "\\cdot ", "⋅": "\\cdot ", "∙": "\\cdot ", "∗": "*",
    "÷": "\\div ", "∕": "/", "⁄": "/", "√": "\\sqrt ", "∛": "\\sqrt[3]", "∜": "\\sqrt[4]", "∞": "\\infty ",
    "°": "\\degree ", "º": "\\degree ", "≤": "\\le ", "⩽": "\\le ", "≥": "\\ge ", "⩾": "\\ge ", "≠": "\\ne ",
    "≈": "\\approx ", "≡": "\\equiv ", "∈": "\\in ", "∪": "\\cup ", "∩": "\\cap ", "∖": "\\setminus ", "±": "\\pm ",
    "∓": "\\mp ", "∅": "\\emptyset ", "ℝ": "\\mathbb{R}", "ℤ": "\\mathbb{Z}", "ℕ": "\\mathbb{N}", "ℚ": "\\mathbb{Q}",
    "ℂ": "\\mathbb{C}", "⌊": "\\lfloor ", "⌋": "\\rfloor ", "⌈": "\\lceil ", "⌉": "\\rceil ", "⟨": "\\langle ",
    "⟩": "\\rangle ", "〈": "\\langle ", "〉": "\\rangle ", "′": "'", "’": "'", "‘": "'", "″": "''", "“": '"', "”": '"',
    "…": "\\ldots ", "⋯": "\\ldots ", "（": "(", "）": ")", "［": "[", "］": "]", "，": ",", "、": ",", "；": ";", "：": ":",
    "。": ".", "％": "%", "＝": "=", "＋": "+", "－": "-", "＜": "<", "＞": ">", "∶": ":", "→": "\\to ", "⇒": "\\to ",
    "ı": "i", "ħ": "\\hbar ", "ℏ": "\\hbar ", "∂": "\\partial ", "∑": "\\sum ", "∏": "\\prod ", "∫": "\\int ",
    "½": "\\frac{1}{2}", "⅓": "\\frac{1}{3}", "⅔": "\\frac{2}{3}", "¼": "\\frac{1}{4}", "¾": "\\frac{3}{4}",
    "⅕": "\\frac{1}{5}", "⅙": "\\frac{1}{6}", "⅛": "\\frac{1}{8}", "⅜": "\\frac{3}{8}", "⅝": "\\frac{5}{8}",
    "⅞": "\\frac{7}{8}", "€": "\\euro ", "£": "\\pounds ", "¥": "\\yen ", "\u00a0": " ", "\u2009": " ", "\u202f": " ",
    "\u200b": "", "\ufeff": "", "𝑖": "i", "∠": "\\angle ", "△": "\\triangle ", "⊥": "\\perp ", "∥": "\\parallel ",
    "∣": "|", "ϵ": "\\epsilon ", "ϕ": "\\phi ", "µ": "\\mu ",
}  # fmt: skip
GREEK = {
    "alpha": "α", "beta": "β", "gamma": "γ", "delta": "δ", "epsilon": "ε", "zeta": "ζ", "eta": "η", "theta": "θ",
    "iota": "ι", "kappa": "κ", "lambda": "λ", "mu": "μ", "nu": "ν", "xi": "ξ", "pi": "π", "rho": "ρ", "sigma": "σ",
    "tau": "τ", "upsilon": "υ", "phi": "φ", "chi": "χ", "psi": "ψ", "omega": "ω", "Gamma": "Γ", "Delta": "Δ",
    "Theta": "Θ", "Lambda": "Λ", "Xi": "Ξ", "Pi": "Π", "Sigma": "Σ", "Upsilon": "Υ", "Phi": "Φ", "Psi": "Ψ",
    "Omega": "Ω",
}  # fmt: skip
CHARACTERS |= {letter: f"\\{name} " for name, letter in GREEK.items()}
CHARACTERS |= {digit: f"^{{{value}}}" for value, digit in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")}
CHARACTERS |= {"⁻": "^-", "ⁿ": "^n"} | {digit: f"_{{{value}}}" for value, digit in enumerate("₀₁₂₃₄₅₆₇₈₉")}

# Command or plain word -> symbol.
NAMED = GREEK | {"var" + name: GREEK[name] for name in ("epsilon", "theta", "pi", "rho", "sigma", "phi")}
NAMED |= {
    "infty": "∞", "infinity": "∞", "infin": "∞", "inf": "∞", "oo": "∞", "hbar": "ħ", "ell": "ℓ", "partial": "∂",
    "mho": "℧", "imath": "i", "jmath": "j", "degree": "°", "ldots": "…", "dots": "…", "cdots": "…", "dotsc": "…",
    "dotsb": "…", "vdots": "…", "ddots": "…", "aleph": "ℵ", "nabla": "∇", "wp": "℘", "Re": "Re", "Im": "Im",
}  # fmt: skip
OPERATORS = {
    "cdot": "*", "times": "*", "ast": "*", "div": "/", "le": "<=", "leq": "<=", "leqslant": "<=", "ge": ">=",
    "geq": ">=", "geqslant": ">=", "ne": "!=", "neq": "!=", "lt": "<", "gt": ">", "pm": "±", "mp": "∓", "cup": "∪",
    "bigcup": "∪", "cap": "∩", "setminus": "∖", "backslash": "∖", "in": "∈", "notin": "∉", "approx": "≈", "simeq": "≈",
    "equiv": "≡", "sim": "~", "cong": "≅", "propto": "∝", "to": "→", "rightarrow": "→", "Rightarrow": "→",
    "implies": "→", "mapsto": "→", "perp": "⊥", "parallel": "∥", "mid": "|", "vert": "|", "lvert": "|", "rvert": "|",
    "Vert": "|", "lfloor": "⌊", "rfloor": "⌋", "lceil": "⌈", "rceil": "⌉", "langle": "(", "rangle": ")",
    "lbrace": "\\{", "rbrace": "\\}", "lbrack": "[", "rbrack": "]", "colon": ":", "prime": "'", "circ": "∘",
    "subset": "⊂", "subseteq": "⊆", "land": "and", "lor": "or", "vee": "or", "wedge": "and", "pounds": "£",
    "euro": "€", "yen": "¥", "choose": "choose", "emptyset": "∅", "varnothing": "∅", "bmod": "mod", "pmod": "mod",
    "mod": "mod", "newline": "\\\\",
}  # fmt: skip
SPACING = set(
    "left right big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr displaystyle textstyle scriptstyle limits "
    "nolimits quad qquad thinspace enspace hspace hfill space normalsize large Large small tiny bf rm it ensuremath".split()
)
FONTS = set(
    "textbf mathbf boldsymbol bm mathit textit emph underline boxed fbox mathsf textsf cancel bcancel pmb mathnormal texttt "
    "mathtt textsc".split()
)
TEXTS = {"text", "mathrm", "mbox", "textrm", "textnormal", "operatorname", "hbox", "rm", "textup"}
ACCENTS = set("overline bar hat vec dot ddot tilde widehat widetilde overrightarrow mathcal mathfrak mathscr".split())

STOP_WORDS = set(
    "if when where for not no mod except than with without is are isnt to base more less most least fewer over under about "
    "approximately nearly almost roughly between until up either neither nor but wrong false incorrect".split()
)
SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
NUMBER_WORDS = {w: i for i, w in enumerate("two three four five six seven eight nine ten eleven twelve".split(), 2)}
NUMBER_WORDS["sixteen"] = 16
SHORT_WORDS = set("yes no odd all any none one two six ten red sun mon tue wed thu fri sat max min dne".split())

_UNITS = {
    "cm": "centimeter centimetre", "mm": "millimeter millimetre", "km": "kilometer kilometre", "m": "meter metre",
    "in": "inch inche", "ft": "foot feet", "yd": "yard", "mi": "mile", "kg": "kilogram kilo", "g": "gram gm",
    "mg": "milligram", "lb": "pound", "oz": "ounce", "L": "liter litre l", "mL": "milliliter millilitre ml",
    "s": "second sec", "min": "minute", "h": "hour hr", "day": "day", "week": "week wk", "month": "month",
    "year": "year yr", "degree": "degree deg", "%": "percent pct percentage", "cent": "cent ¢",
    "$": "dollar buck usd", "unit": "unit", "N": "newton", "J": "joule", "W": "watt", "V": "volt", "A": "ampere amp",
    "K": "kelvin", "Pa": "pascal", "Hz": "hertz", "rad": "radian", "C": "celsius", "F": "fahrenheit",
}  # fmt: skip
_SPELLINGS = {long: short for short, names in _UNITS.items() for long in [short, *names.split()]}


def unit_name(words: str) -> str:
    """One spelling per unit: "square inches" and "in^2" agree, "cm" and "m" do not."""
    words = regex.sub(r"(square|sq|cubic|cu)\b\.?\s*([A-Za-z]+)", lambda m: f"{m[2]}^{2 if m[1][0] == 's' else 3}", words)
    words = regex.sub(r"\bsquared\b", "^2", regex.sub(r"\bcubed\b", "^3", words))
    words = words.replace(" per ", "/").replace("·", " ").replace(".", "")
    return regex.sub(r"[\s{}]+", "", regex.sub(r"[A-Za-z%$¢]+", _one_unit, words)).replace("mi/h", "mph")


def _one_unit(match: regex.Match) -> str:
    word = match.group()
    if word in _SPELLINGS:
        return _SPELLINGS[word]
    word = word.lower()
    single = word[:-1] if word.endswith("s") and len(word) > 2 else word
    return _SPELLINGS.get(word) or _SPELLINGS.get(single) or single

FUNCTION_NAMES = FUNCTIONS - {"!", "!!", "root", "abs", "floor", "ceil", "mod", "binom"} | {"log", "lg", "exp", "tg", "ctg"}
ALIASES = {"arcsin": "asin", "arccos": "acos", "arctan": "atan", "tan": "tg", "cot": "ctg"}
ALIASES = {short: long for long, short in ALIASES.items()}
COMMANDS = set("sqrt binom begin end sum prod int lim angle triangle measuredangle mathbb".split()) | ACCENTS
COMMANDS |= {"frac", "dfrac", "tfrac", "cfrac", "dbinom", "tbinom"}
MATRICES = "pmatrix|bmatrix|matrix|smallmatrix|Bmatrix|vmatrix|array"
LISTS = "aligned|align|cases|gathered|split"
KNOWN = set(NAMED) | set(OPERATORS) | SPACING | FONTS | TEXTS | COMMANDS | FUNCTION_NAMES | set(ALIASES)

_TRANSLATION = str.maketrans(CHARACTERS)
_NAMES_IN_RUN = "|".join(sorted(FUNCTION_NAMES | {"pi", "sqrt"} | {n for n in GREEK if len(n) > 2}, key=len, reverse=True))
_RUN = regex.compile(rf"([A-Za-z]?)({_NAMES_IN_RUN})({'|'.join(GREEK)}|[A-Za-z]?)")
_GROUPED = regex.compile(r"\d{1,3}(?P<sep>,\\!\s*|\{,\}\s*|\\,|,|[ ~])\d{3}(?:(?:,\\!\s*|\{,\}\s*|\\,|,|[ ~])\d{3})*(?!,?\d)")
_NUMBER = regex.compile(r"(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_TOKEN = regex.compile(
    r"(?P<space>(?:[\s~\"]|\\[,;:!> ])+)|\\begin\s*\{?(?P<begin>%s)\*?\}?(?:\s*(?<=array\})\{[^{}]*\})?"
    r"|\\end\s*\{?(?P<end>%s)\*?\}?|\\(?P<command>[A-Za-z]+)|\\(?P<escaped>[{}%%&#_|$])|(?P<row>\\\\(?:\[[^\[\]]*\])?)"
    r"|(?P<run>[A-Za-z]+)|(?P<op><=|>=|!=|==|->|=>|\.\.\.|[-+*/^_!()\[\]{}|:=<>&%%,;'])" % ((f"{MATRICES}|{LISTS}",) * 2)
)
_PLAIN_OPERATORS = {"==": "=", "->": "→", "=>": "→", "...": "…"}
_RELATIONS = set("= < > <= >= != ∈ ∉ ≈ ≡ ~ ≅ ∝ → ⊥ ∥ ⊂ ⊆".split())
_SEPARATORS = {",", ";", "or", "and", "\\\\"}


# ---------------------------------------------------------------------------------------------- the cutting


def clean(text: str) -> str:
    """The text without math delimiters, final punctuation and spellings that mean the same."""
    if len(text) > MAX_CHARS:
        raise Unreadable(f"it has {len(text):,} characters, more than {MAX_CHARS:,}")
    if regex.search(r"[\x00-\x08\x0b-\x1f\x7f]", text):
        raise Unreadable("it holds a control character")
    text = text.translate(_TRANSLATION)
    text = regex.sub(r"(?<!\\)(?:\\\\)*\K(?:\\[()\[\]]|\$)", " ", text).strip()
    text = regex.sub(r"^\*\*(.*)\*\*$", r"\1", text).replace("**", "^")
    text = regex.sub(r"\\(?:left|right)\s*\.|\\(?:text)?color\s*\{\w+\}|\b(?:np|math|numpy)\.", " ", text)
    text = regex.sub(r"\bd([a-zA-Z])/d([a-zA-Z])\b", r"\\frac{d\1}{d\2}", text)
    text = regex.sub(r"(?<=\d)\s*[xX]\s*(?=10\s*\^)", r"\\times ", text)
    text = regex.sub(r"(\d{0,30})\.(\d{0,30})\\(?:overline|bar|dot)\s*\{(\d{1,30})\}", _repeating, text)
    text = regex.sub(r"(?<!\.\.)(?:\s|[.,;:]|\\[,;!\s]|\\\\|\\$)+$", "", text)
    return regex.sub(r"^<(.*,.*)>$", r"(\1)", text)


def _repeating(match: regex.Match) -> str:
    whole, start, cycle = match.groups()
    top = int(whole + start + cycle) - int(whole + start or 0)
    return f"\\frac{{{top}}}{{{'9' * len(cycle)}{'0' * len(start)}}}"


def tokenize(text: str, grouped: bool = True, depth: int = 0) -> list[tuple[str, str]]:
    """Tokens (kind, value). `grouped`: whether the plain comma of "1,234" is part of the number."""
    out: list[tuple[str, str]] = []
    at = 0
    while at < len(text):
        number = _match_number(text, at, grouped)
        if number:
            out.append(("NUM", regex.sub(r"[^\d.eE+-]", "", number)))
            at += len(number)
            continue
        match = _TOKEN.match(text, at)
        if not match:
            raise Unreadable(f"it holds the character {text[at]!r}")
        kind, value, at = match.lastgroup, match[match.lastgroup], match.end()
        if kind in ("begin", "end"):
            out.append(("BEGIN" if kind == "begin" else "END_ENV", value))
        elif kind == "row":
            out.append(("SEP", "\\\\"))
        elif kind == "escaped":
            out.append({"$": ("CURRENCY", "$"), "|": ("OP", "|"), "%": ("OP", "%")}.get(value, ("OP", "\\" + value)))
        elif kind == "run":
            out += _run(value, out)
        elif kind == "op":
            if value == "!=" and out and out[-1][0] == "NUM":
                out.append(("OP", "!"))
                value = "="
            out.append(_operator(_PLAIN_OPERATORS.get(value, value)))
        elif kind == "command":
            at = _command(value, text, at, out, grouped, depth)
        if len(out) > MAX_TOKENS:
            raise Unreadable(f"it has more than {MAX_TOKENS} parts")
    return out


def _match_number(text: str, at: int, grouped: bool) -> str | None:
    match = _GROUPED.match(text, at)
    if match and not (at > 1 and text[at - 1] == "," and text[at - 2].isdigit()):
        inside = text[:at].rstrip()[-1:] in ("(", "[", "{") and text[match.end() :].lstrip()[:1] in (")", "]", "}", "\\")
        plain = match["sep"] == "," and ",0" not in match.group()
        if not plain or (grouped and not inside):
            tail = regex.compile(r"\.\d+").match(text, match.end())
            return match.group() + (tail.group() if tail else "")
    match = _NUMBER.match(text, at)
    return match.group() if match else None


def _operator(value: str) -> tuple[str, str]:
    if value in _SEPARATORS:
        return ("SEP", value)
    return ("NAME", "…") if value == "…" else ("REL" if value in _RELATIONS else "OP", value)


def _run(run: str, before: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """A run of letters: a name, a function, a word, or a product of single letters."""
    if run in ("or", "and", "mod"):
        return [_operator(run)]
    name = ALIASES.get(run, run)
    if name == "sqrt" or name in FUNCTION_NAMES and name not in ("re", "im", "arg"):
        return [("COMMAND" if name == "sqrt" else "FUNC", name)]
    if len(run) > 1 and run in NAMED and run not in ("Re", "Im", "in", "to"):
        return [("NAME", NAMED[run])]
    parts = _RUN.fullmatch(run)
    if parts and parts[2] not in ("re", "im", "arg"):
        return [token for part in parts.groups() if part for token in _run(part, before)]
    if len(run) > 3 or (len(run) > 1 and before and before[-1][0] == "NUM" and unit_name(run) != run.lower() + "?"):
        known = len(run) > 3 or unit_name(run) in _SHORT_UNITS
        if known:
            return [("TEXT", run)]
    return [("NAME", letter) for letter in run]


_SHORT_UNITS = {"cm", "mm", "km", "in", "ft", "yd", "mi", "kg", "mg", "lb", "oz", "mL", "min", "h", "s", "degree", "%", "mph"}


def _command(name: str, text: str, at: int, out: list[tuple[str, str]], grouped: bool, depth: int) -> int:
    """Appends what a command stands for; returns where the text goes on."""
    if name not in KNOWN:
        known = next((name[:cut] for cut in (len(name) - 1, len(name) - 2) if name[:cut] in KNOWN), None)
        if known is None or len(known) < 2:
            raise Unreadable(f"it uses the unknown command \\{name}")
        at, name = at - (len(name) - len(known)), known
    if name in TEXTS and name != "rm":
        start, stop = _group(text, at)
        out += _text(text[start:stop], grouped, depth)
        return stop + 1
    if name in OPERATORS:
        value = OPERATORS[name]
        out.append(("CURRENCY", value) if value in "£€¥" else _operator("pmod" if name == "pmod" else value))
    elif name in NAMED:
        out.append(("NAME", NAMED[name]))
    elif name in FUNCTION_NAMES or name in ALIASES:
        out.append(("FUNC", ALIASES.get(name, name)))
    elif name in COMMANDS:
        out.append(("COMMAND", name))
    return at


def _group(text: str, at: int) -> tuple[int, int]:
    """Start and end of the content of the {group} at `at`."""
    opening = regex.compile(r"\s*\{").match(text, at)
    if not opening:
        raise Unreadable("a text command has no braces")
    depth = 1
    for brace in regex.finditer(r"\\.|[{}]", text, pos=opening.end(), flags=regex.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if not depth:
            return opening.end(), brace.start()
    raise Unreadable("a brace is never closed")


def _text(content: str, grouped: bool, depth: int) -> list[tuple[str, str]]:
    words = regex.sub(r"(?:[\s~$]|\\[,;:! ])+", " ", content).strip(" .,")
    if not regex.fullmatch(r"[A-Za-zÀ-ÿ][A-Za-zÀ-ÿ'’\-./ ]*", words) or words in ("e", "i", "d"):
        if depth > 3:
            raise Unreadable("text commands are nested too deep")
        return tokenize(content, grouped, depth + 1)
    if words.lower() in ("or", "and"):
        return [("SEP", words.lower())]
    name = ALIASES.get(words, words)
    if name in FUNCTION_NAMES:
        return [("FUNC", name)]
    pieces = regex.split(r"\s+(or|and)\s+", words)
    return [("SEP", piece) if k % 2 else ("TEXT", piece) for k, piece in enumerate(pieces)]
