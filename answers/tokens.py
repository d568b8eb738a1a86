"""This file cuts an answer into tokens. Before the cut the text is cleaned, and spellings with the same meaning get
one form.

A token is a pair (kind, value). The kinds are NUM (digits), NAME (a variable or constant), FUNC (a function), TEXT
(words), COMMAND (a LaTeX command with arguments), BEGIN and END_ENV (begin and end of an environment such as a
matrix), REL (a relation), SEP (between the items of a list), CURRENCY, and OP (operators, brackets and all other
signs).
"""
# ruff: isort: skip_file

import re

from .tree import NUMBER_WORDS, Unreadable, word_set
from .vocabulary import (
    ALIASES, CHARACTERS, COMMANDS, CURRENCIES, FONTS, FUNCTION_NAMES, GREEK, KNOWN, LISTS, MATRICES, NAMED, OPERATORS,
    SCALES, SHORT_UNITS, STOP_WORDS, TEXTS,
)  # fmt: skip

MAX_CHARS, MAX_TOKENS = 2_000, 700

_TRANSLATION = str.maketrans(CHARACTERS)
_SCRIPTS = re.compile("([⁺⁻⁰¹²³⁴-⁹ⁿ]+)|([₊₋₀-₉]+)")
_SCRIPT_DIGITS = str.maketrans("⁺⁻⁰¹²³⁴⁵⁶⁷⁸⁹ⁿ₊₋₀₁₂₃₄₅₆₇₈₉", "+-0123456789n+-0123456789")
_NAMES_IN_RUN = "|".join(
    sorted(FUNCTION_NAMES | {"pi", "sqrt"} | {n for n in GREEK if len(n) > 2}, key=len, reverse=True)
)
_RUN = re.compile(rf"([A-Za-z]?)({_NAMES_IN_RUN})({'|'.join(GREEK)}|[A-Za-z]?)")
_GROUPED = re.compile(
    r"\d{1,3}(?P<sep>,\\!\s*|\{,\}\s*|\\,|,|[ ~])\d{3}(?:(?:,\\!\s*|\{,\}\s*|\\,|,|[ ~])\d{3})*(?!,?\d)(?:\.\d+)?"
)
_NUMBER = re.compile(r"(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_TOKEN = re.compile(
    r"(?P<space>(?:[\s~\"]|\\[,;:!> ])+)|\\begin\s*\{?(?P<begin>%s)\*?\}?(?:\s*(?<=array\})\{[^{}]*\})?"
    r"|\\end\s*\{?(?P<end>%s)\*?\}?|\\(?P<command>[A-Za-z]+)|\\(?P<escaped>[{}%%&#_|$])|(?P<row>\\\\(?:\[[^\[\]]*\])?)"
    r"|(?P<run>[A-Za-z]+)|(?P<op><=|>=|!=|==|->|=>|\.\.\.|[-+*/^_!()\[\]{}|:=<>&%%,;'])"
    % ((f"{MATRICES}|{LISTS}",) * 2)
)
# an introduction before a value, such as \text{The area is } or \text{Answer: }
_LEAD = re.compile(
    r"^(?:\\(?:text|mbox)\s*\{ *)?(?P<words>(?=[^:}]*[a-z]{3})[A-Za-z][A-Za-z ,]{0,60})"
    r"(?: (?:is|are|was|were)|:)[ }:]*(?=[-\d\\(\[])"
)
_FONT = re.compile(rf"\\(?:{'|'.join(FONTS)})\s*(?=\{{)")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_PLAIN_OPERATORS = {"==": "=", "->": "→", "=>": "→", "...": "…"}
_RELATIONS = word_set("= < > <= >= != ∈ ∉ ≈ ≡ ~ ≅ ∝ → ⊥ ∥ ⊂ ⊆")
NO_UNIT = STOP_WORDS.union(NUMBER_WORDS, SCALES, (f"{scale}s" for scale in SCALES))
# The pattern finds what follows a word in prose: a number or a word of two or three letters, as in "he has 12".
# Without this pattern, "he" in "he has 12" would be the product h·e.
_FOLLOWING = re.compile(r" (?:\d|([a-z]{2,3})(?![A-Za-z]))")
_NO_PROSE = KNOWN | SHORT_UNITS | {"or", "and"}
NO_NAME = NO_UNIT | {"square", "squared", "cube", "cubed", "root", "twice", "double", "triple"}
_SEPARATORS = {",", ";", "or", "and", "\\\\"}


# ---------------------------------------------------------------------------------------------- the cutting


def _symbol_unit(match: re.Match) -> str:
    unit = re.sub(r"\\(?:text|mathrm)|[^A-Za-z]", "", match["unit"])
    return f"{match['value']}\\text{{ {unit}}}"


def _repeating(match: re.Match) -> str:
    whole, start, cycle = match.groups()
    top = int(whole + start + cycle) - int(whole + start or 0)
    return f"\\frac{{{top}}}{{{'9' * len(cycle)}{'0' * len(start)}}}"


_UNIT = r"\s*\\(?:text|mathrm) *\{([^{}]*)\}\s*"
_SHORT_UNIT = "|".join(sorted(SHORT_UNITS))
# The replacements below are applied from top to bottom.
_REWRITTEN = [(re.compile(pattern), spelling) for pattern, spelling in (
    (r"\^ *(?:\{ *(?:\\prime *|')+\}|\\prime)", lambda match: "'" * len(re.findall("prime|'", match[0]))),
    (r"\\left\s*\\\{\s*\\begin\s*\{array\}\s*(?:\{[lcr]+\})?((?s:.*?))\\end\s*\{array\}\s*\\right\s*\.",
     r"\\begin{cases}\1\\end{cases}"),
    (r"\\cup(?= *[a-z] *(?:[<>=]|\\[gln]e))", r"\\text{ or }"),  # in "x < 1 ∪ x > 2" the sign ∪ means "or"
    # a subscript is put before the exponent: E^2_0 becomes E_0^2
    (r"([A-Za-z]) *\^ *(\w|\{[^{}]*\}) *_ *(\w|\{[^{}]*\})", r"\1_\3^\2"),
    (r"\\mathop\s*\{((?:[^{}]|\{[^{}]*\})*)\}", r"\1 "),
    (r"^\*\*(.*)\*\*$", r"\1"),
    (r"\*\*", "^"),
    (r"\\(?:left|right)\s*\.|\\(?:text)?color\s*\{\w+\}|\b(?:np|math|numpy)\.", " "),
    (r"\bd([a-zA-Z])/d([a-zA-Z])\b", r"\\frac{d\1}{d\2}"),
    (r"(?<=\d)\s*(k?m/(?:s|h|hr)(?:\^\{?2\}?)?)(?![A-Za-z])", r"\\text{ \1}"),
    (rf"\\[dt]?frac *\{{{_UNIT}\}} *\{{{_UNIT}(\^(?:\d|\{{\d\}}))?\}}", r"\\text{ \1/\2}\3"),
    # the next three patterns find the base of a number, degrees written with the letter o, and degrees before C and F
    (r"\s*(?:\\(?:text|mathrm|mbox)\s*\{)?[\s~]*\(?(?:in )?base[\s~]*\}?\s*\$?(\d{1,2})\$?\)?\s*\}?$", r"_{\1}"),
    (r"(?<=[\d)}])\s*\^\s*(?:\{?\s*\\(?:text|mathrm|mbox)\s*\{\s*o\s*\}\s*\}?|\{o\}|o\b)", r"^\\circ "),
    (r"(\d *(?:\\degree|\^ *\{? *\\circ *\}?)) *([CF])$", r"\1\\text{ \2}"),
    (r"(?<=[)\]])\s*U\s*(?=[(\[][^()\[\]]*,)", r"\\cup "),  # in "(0, 1) U (2, 3)" the letter U means a union
    (r"(?<=\d)\s*[xX]\s*(?=10\s*\^)", r"\\times "),
    (r"(\d{0,30})\.(\d{0,30})\\(?:overline|bar|dot)\s*\{(\d{1,30})\}", _repeating),
    (r"(?:\s|[.,;:]|\\[,;!\s]|\\\\|\\$)+$", ""),
    (r"(?<!\.[a-z])\.(?=\s*\}+$)|^(?:=|\\approx|\\simeq)\s*", ""),
    # a unit in parentheses, as in 12 (cm^2)
    (rf"(?<=\d)(?:\s|\\[,;: ])*\(\s*({_SHORT_UNIT})\s*(\^\{{?\d\}}?)?\s*\)", r"\\text{ \1}\2"),
    # a unit that is a symbol, such as \Omega or \mu m, if the rest of the answer is one number
    (r"^(?P<value>(?=[^\\]*\d)[-\d.eE+{},^\s]*+(?:\\(?:times|cdot)\s*+10\s*+\^[-\d{}\s]*+)?+)(?:\s|~|\\[,;: ])*+"
     r"(?P<unit>(?:\\(?:text|mathrm)\s*\{[~\s]*)?(?:[MLR]\s*\}?_\s*\{?\\odot|[kM]?\\Omega|\\AA|\\mathring\s*\{?A)"
     r"|\\mu\s*\\(?:text|mathrm)\s*\{\s*[A-Za-z]{1,2}|\\(?:text|mathrm)\s*\{[~\s]*\\mu\s*[A-Za-z]{1,2})[}\s]*$",
     _symbol_unit),
    (r"(?<=[\d})])(?:[\s~]|\\[,;: ])*(?:\\(?:text|mathrm|mbox)\s*\{[\s~]*)?(min|sec)s?\s*\}?$", r"\\text{ \1}"),
)]  # fmt: skip


def clean(text: str) -> str:
    """Returns the text without math delimiters and final punctuation. Different spellings with the same meaning get
    one form."""
    if re.search(r"[\x00-\x08\x0b-\x1f\x7f]", text):
        raise Unreadable("it holds a control character")
    text = _SCRIPTS.sub(lambda m: ("^{" if m[1] else "_{") + m.group().translate(_SCRIPT_DIGITS) + "}", text)
    text = re.sub(r"[\s~]+", " ", text.translate(_TRANSLATION)).replace("...", "\\ldots ").replace("{:}", ":")
    text = re.sub(r"(?<!\\)((?:\\\\)*)(?:\\[()\[\]]|\$)", r"\1 ", text).strip()
    for pattern, spelling in _REWRITTEN:
        text = pattern.sub(spelling, text)
    if text.endswith("}") and text.count("}") - text.count("\\}") > text.count("{") - text.count("\\{"):
        text = text[:-1]
    text = _without_font(text)
    lead = _LEAD.match(text)
    if lead and not STOP_WORDS.intersection(lead["words"].lower().split()):
        text = text[lead.end() :].lstrip()
    text = re.sub(r"^\](?=[^\[\]]*,[^\[\]]*[\[\]]$)", "(", text)  # the open interval ]0, 1[ becomes (0, 1)
    text = re.sub(r"^([(\[][^\[\]]*,[^\[\]]*)\[$", r"\1)", text)
    return re.sub(r"^<(.*,.*)>$", r"(\1)", text)


def _without_font(text: str) -> str:
    """Returns the text without font commands such as \\mathbf{...} around the whole text."""
    for _ in range(3):
        match = _FONT.match(text)
        start, stop = _group(text, match.end()) if match else (0, 0)
        if not match or text[stop + 1 :].strip():
            break
        text = text[start:stop].strip()
    return text


def tokenize(text: str, grouped: bool = True, depth: int = 0) -> list[tuple[str, str]]:
    """Returns the tokens (kind, value) of a text. `grouped` says whether "1,234" is one number or the list 1, 234."""
    out: list[tuple[str, str]] = []
    at = 0
    while at < len(text):
        number = _match_number(text, at, grouped) if text[at].isdigit() or text[at] == "." else None
        if number:
            out.append(("NUM", re.sub(r"[^\d.eE+-]", "", number)))
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
            spaced = text[match.start() - 1 : match.start()] in " " and text[at : at + 1] in " ,."
            letters = _run(value, out, spaced)
            following = _FOLLOWING.match(text, at) if 1 < len(value) == len(letters) and not value.isupper() else None
            if following and following[1] not in _NO_PROSE:
                raise Unreadable(f"the word {value!r} is no part of an answer")
            out += letters
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
        opened, closed = text[:at].rstrip()[-1:], text[match.end() :].lstrip()[:1]
        inside = opened in ("(", "[", "{") and closed in (")", "]", "}", "\\")
        plain = match["sep"] == "," and ",0" not in match.group()
        if not plain or (grouped and not inside):
            return match.group()
    match = _NUMBER.match(text, at)
    return match.group() if match else None


def _operator(value: str) -> tuple[str, str]:
    if value in _SEPARATORS:
        return ("SEP", value)
    return ("NAME", "…") if value == "…" else ("REL" if value in _RELATIONS else "OP", value)


def _run(run: str, before: list[tuple[str, str]], spaced: bool = False) -> list[tuple[str, str]]:
    """Reads consecutive letters as a name, a function, a word, or a product of letters. `spaced` says whether the
    letters stand between spaces."""
    if run in ("or", "and", "mod", "modulo"):
        return [_operator(run[:3])]
    if run in CURRENCIES:
        return [("CURRENCY", CURRENCIES[run])]
    name = ALIASES.get(run, run)
    if name == "sqrt" or (name in FUNCTION_NAMES and name not in ("re", "im", "arg")):
        return [("COMMAND" if name == "sqrt" else "FUNC", name)]
    if len(run) > 1 and run in NAMED and run not in ("Re", "Im", "in", "to", "square", "star"):
        return [("NAME", NAMED[run])]
    parts = _RUN.fullmatch(run)
    if parts and parts[2] not in ("re", "im", "arg"):
        return [token for part in parts.groups() if part for token in _run(part, before)]
    # without a space, 2mg is the product 2·m·g, not 2 milligrams
    follows = before and before[-1][0] in ("NUM", "TEXT") and (spaced or run != "mg")
    if len(run) > 3 or (follows and run in SHORT_UNITS) or (spaced and run in NO_UNIT):
        return [("TEXT", run)]
    letters = [("NAME", letter) for letter in run]
    if len(run) > 1 and before and before[-1] == ("OP", "/"):  # letters behind a slash stay together: t/RC is t/(RC)
        return [("OP", "("), *letters, ("OP", ")")]
    return letters


def _command(name: str, text: str, at: int, out: list[tuple[str, str]], grouped: bool, depth: int) -> int:
    """Appends the tokens of a LaTeX command to `out`. Returns the position in `text` behind the command and its
    arguments."""
    if name not in KNOWN:
        known = next((name[:cut] for cut in (len(name) - 1, len(name) - 2) if name[:cut] in KNOWN), None)
        if known is None or len(known) < 2:
            raise Unreadable(f"it uses the unknown command \\{name}")
        at, name = at - (len(name) - len(known)), known
    if name in TEXTS and name != "rm":
        start, stop = _group(text, at)
        out += _text(text[start:stop], out, grouped, depth)
        return stop + 1
    if name in OPERATORS:
        value = OPERATORS[name]
        out.append(("CURRENCY", value) if value in "£€¥" else _operator(value))
    elif name in NAMED:
        out.append(("NAME", NAMED[name]))
    elif name in FUNCTION_NAMES or name in ALIASES:
        out.append(("FUNC", ALIASES.get(name, name)))
    elif name in COMMANDS:
        out.append(("COMMAND", name))
    return at


def _group(text: str, at: int) -> tuple[int, int]:
    """Returns start and end of the content of the {group} that begins at position `at`."""
    opening = re.compile(r"\s*\{").match(text, at)
    if not opening:
        raise Unreadable("a text command has no braces")
    depth = 1
    for brace in _BRACE.finditer(text, opening.end()):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if not depth:
            return opening.end(), brace.start()
    raise Unreadable("a brace is never closed")


def _text(content: str, before: list[tuple[str, str]], grouped: bool, depth: int) -> list[tuple[str, str]]:
    """Returns the tokens of the content of \\text{...}: words, a unit after a number, a separator, or a function. Any
    other content gives the tokens that it would give outside \\text."""
    words = re.sub(r"(?:[\s~$]|\\[,;:! ])+", " ", content).strip(" .,")
    last = next((token for token in reversed(before) if token != ("OP", "(")), END)
    after_value = last[0] == "NUM" or last[1] in (")", "}")
    if after_value and words[:1] + words[-1:] == "()":
        words = words[1:-1]
    if after_value and words in ("min", "sec"):
        return [("TEXT", words)]
    unit = re.sub(r"\\cdot|[{}]", " ", words)
    if after_value and "^" in unit and re.fullmatch(r"[A-Za-zÀ-ÿ](?:[A-Za-zÀ-ÿ /()-]|\^ *-?\d)*", unit):
        return [("TEXT", unit)]
    if not re.fullmatch(r"[A-Za-zÀ-ÿ][A-Za-zÀ-ÿ'’\-./ ]*", words) or words in ("e", "i", "d"):
        if depth > 3:
            raise Unreadable("text commands are nested too deep")
        return tokenize(content, grouped, depth + 1)
    if words.lower() in ("or", "and", "mod", "modulo"):
        return [_operator(words.lower()[:3])]
    name = ALIASES.get(words, words)
    if name in FUNCTION_NAMES:
        return [("FUNC", name)]
    pieces = re.split(r"\s+(or|and)\s+", words)
    return [("SEP", piece) if k % 2 else ("TEXT", piece) for k, piece in enumerate(pieces)]


END = ("END", "")


class Cursor:
    """A current position in a list of tokens, with methods that read the tokens from there."""

    def __init__(self, tokens: list[tuple[str, str]]):
        self.tokens, self.at = tokens, 0

    @property
    def token(self) -> tuple[str, str]:
        return self.tokens[self.at] if self.at < len(self.tokens) else END

    def ahead(self, count: int) -> tuple[str, str]:
        return self.tokens[self.at + count] if self.at + count < len(self.tokens) else END

    def take(self) -> str:
        value = self.token[1]
        self.at += 1
        return value

    def is_op(self, *values: str) -> bool:
        return self.token[0] == "OP" and self.token[1] in values

    def accept(self, *values: str) -> str:
        """Takes the current token if it is an operator in `values`, else returns ""."""
        kind, value = self.token
        if kind != "OP" or value not in values:
            return ""
        self.at += 1
        return value

    def expect(self, *values: str) -> str:
        if not self.is_op(*values):
            raise Unreadable(f"{self.token[1] or 'the end'!r} stands where {' or '.join(values)} is expected")
        return self.take()

    def script_text(self) -> str:
        """Returns the text of a subscript: 1 for x_1, n+1 for x_{n+1}, red for \\lambda_{\\text{red}}."""
        if not self.accept("{"):
            return self.take()
        text, depth = "", 1
        while depth:
            if self.token == END:
                raise Unreadable("a brace is never closed")
            value = self.take()
            depth += {"{": 1, "}": -1}.get(value, 0)
            text += value.strip("{}")
        return text

    def is_application(self, name: str) -> bool:
        if self.ahead(1)[0] in ("NUM", "NAME", "TEXT") and self.ahead(2) == ("OP", ")"):
            return True
        if name[0] in "fghFGHP" and self.ahead(1) == ("OP", "-") and self.ahead(3) == ("OP", ")"):
            return True
        depth = 0
        for k in range(self.at, len(self.tokens)):
            kind, value = self.tokens[k]
            if kind == "OP":
                depth += (value in ("(", "[", "{", "\\{")) - (value in (")", "]", "}", "\\}"))
            if depth < 1:
                return False
            if depth == 1 and (kind == "REL" or value == ","):
                return True
        return False

    def is_unit(self) -> bool:
        """Returns whether a unit in parentheses, such as (weeks) or (cm^2), begins at the current token."""
        return self.is_op("(") and self.ahead(1)[0] == "TEXT" and self.ahead(2)[1] in (")", "^", "/")

    def unit_words(self) -> tuple[int, str]:
        """Reads the words of a unit, with or without parentheses. Returns (factor, unit). The factor is the number
        that a word such as "million" stands for, else 1."""
        words, scale = "", 1
        in_parentheses = self.is_unit() and self.take()
        while True:
            if self.token[0] == "TEXT" or self.is_op("%") or self.token[0] == "CURRENCY":
                words += " " + self.take()
            elif words and self.accept("^"):
                words += f"^{self.script_text()}"
            elif words and self.is_op("/", "*") and self.ahead(1)[0] == "TEXT":
                words += "/" if self.take() == "/" else " "
            else:
                break
        if in_parentheses:
            self.expect(")")
        if not words:
            return 1, ""
        pieces = words.split()
        while pieces and pieces[0].lower().rstrip("s") in SCALES:
            scale *= SCALES[pieces.pop(0).lower().rstrip("s")]
        is_power = pieces[:1] in (["squared"], ["cubed"])
        if len(pieces) > 4 or is_power or not NO_UNIT.isdisjoint(map(str.lower, pieces)):
            raise Unreadable(f"the words{words!r} follow the answer")
        return scale, " ".join(pieces)
