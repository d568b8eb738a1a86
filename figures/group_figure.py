"""This file draws one group of rollouts as a picture. The picture shows each token with its source (policy or
demonstration), its entropy, whether the token keeps its weight, and the weight.

    8  hybrid     one cell per token, coloured by source; a frame marks a kept token if others are dropped
       kept       ■ or □ (only in a row that loses tokens)
       entropy    grey bars
       weight     bars up (w > 0, more likely) or down (w < 0, less likely)

All coordinates are in points (1/72 inch) from the top left corner. Each rollout is drawn on one line. Tokens that do
not fit into the line are counted, not drawn.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.patches import Rectangle

from figures import group_log as log
from figures.figure import TYPE, WIDTH, save
from figures.group_log import FAINT, INK, Group, Row

PAGE = 72 * WIDTH
LEFT, RIGHT = 100.0, PAGE - 8  # left and right edge of the tokens; words left of the tokens name the row
# Type sizes of the tokens. The largest size at which every row fits on one line is used, else the last size.
SIZES = (10.5, 10.0, 9.5, 9.0, 8.5, 8.0)
TEXT, SMALL = 8.0, 7.0  # type sizes of the words beside the tokens
KEPT, ENTROPY, WEIGHT, BETWEEN, BRACKET = 6.0, 9.0, 13.0, 6.0, 11.0  # heights of the parts of a row in points
NOTE = 50.0  # width that the note "… 312 more" needs
MONO = "DejaVu Sans Mono"  # font of the tokens, which comes with matplotlib


@dataclass
class Cell:
    """The cell of a token: its index in the row, left edge, width and text."""

    index: int
    x: float
    width: float
    text: str


@dataclass
class Picture:
    """What each drawing function needs: the matplotlib axis, the group, and the scales of entropy and weight."""

    axis: Axes
    group: Group
    size: float  # type size of the tokens
    entropy_top: float
    weight_top: float

    @property
    def cell(self) -> float:
        """Returns the height of a token's cell."""
        return 1.5 * self.size

    def write(self, x: float, y: float, text: str, size: float = TEXT, ink: str = INK, **kwargs: object) -> None:
        """Draws text whose vertical middle is at y."""
        self.axis.text(x, y, text, fontsize=size, color=ink, va="center_baseline", **kwargs)

    def box(self, x: float, y: float, width: float, height: float, colour: str, edge: str = "none") -> None:
        self.axis.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor=edge, linewidth=0.8))

    def line(self, xs: list[float], ys: list[float], colour: str = "#BBBBBB") -> None:
        self.axis.plot(xs, ys, color=colour, linewidth=0.7, solid_capstyle="butt")


@cache
def drawable(text: str, longest: int = 24) -> str:
    """Returns the text of a token as it is drawn, with □ for characters that the font lacks."""
    font = get_font(findfont(MONO))
    return "".join(c if font.get_char_index(ord(c)) else "□" for c in log.visible(text, longest))


def character(size: float) -> float:
    """Returns the width of a character in the font MONO."""
    return 0.602 * size


def flow(tokens: list[str], total: int, size: float) -> tuple[list[Cell], str]:
    """Returns the cells of the tokens that fit into a line, and the note behind them: "… 312 more" if 312 of the
    `total` tokens do not fit, else ""."""
    texts = [drawable(token) for token in tokens]
    widths = [len(text) * character(size) + 0.25 * size for text in texts]
    room = RIGHT - LEFT if sum(widths) <= RIGHT - LEFT and len(tokens) == total else RIGHT - LEFT - NOTE
    cells, x = [], LEFT
    for index, (text, width) in enumerate(zip(texts, widths)):
        if x + width > LEFT + room:
            return cells, f"… {total - index} more"
        cells.append(Cell(index, x, width, text))
        x += width
    return cells, f"… {total - len(tokens)} more" if total > len(tokens) else ""


def token_size(group: Group) -> float:
    def fits(size: float) -> bool:
        return not any(flow(row["tokens"], row["tokens_total"], size)[1] for row in group["rows"])

    return next(filter(fits, SIZES), SIZES[-1])


def group_figure(group: Group) -> Figure:
    """Returns the picture of a group as a matplotlib figure. group_log.py describes the dictionary `group`."""
    with matplotlib.rc_context(TYPE):
        figure = Figure()
        axis = figure.add_axes((0, 0, 1, 1))
        picture = Picture(axis, group, token_size(group), *log.scales(group))
        y = draw_head(picture)
        for number, row in enumerate(group["rows"], 1):
            y = draw_row(picture, row, number, y)
        height = draw_legend(picture, y)
        figure.set_size_inches(WIDTH, height / 72)
        axis.set_xlim(0, PAGE)
        axis.set_ylim(height, 0)
        axis.axis("off")
    return figure


def draw_group(group: Group, target: Path | str) -> Path:
    """Writes the picture of a group to `target` (.png, .pdf or .svg)."""
    return save(group_figure(group), Path(target))


def draw_head(picture: Picture) -> float:
    """Draws title, problem and answer. Returns the y coordinate at which the rows begin."""
    group = picture.group
    picture.write(8, 14, log.title(group), 11, weight="bold")
    picture.write(8, 30, log.summary(group), TEXT)
    picture.write(8, 54, "problem", weight="bold")
    answer = f"right answer: {drawable(group['answer'])}"
    problem = drawable(" ".join(group["problem"].split()), 90).replace("·", " ")
    picture.write(LEFT, 54, f"{problem}    {answer}")
    return 72


def draw_cell(picture: Picture, cell: Cell, y: float, colour: str, edge: str = "none", **kwargs: object) -> None:
    picture.box(cell.x + 0.4, y, cell.width - 0.8, picture.cell, colour, edge)
    middle = cell.x + cell.width / 2, y + picture.cell / 2
    picture.write(*middle, cell.text, picture.size, ha="center", family=MONO, **kwargs)


# ---- a row


def draw_row(picture: Picture, row: Row, number: int, y: float) -> float:
    """Draws a row of the group and the words on its left. Returns the y coordinate at which the next row begins."""
    cells, note = flow(row["tokens"], row["tokens_total"], picture.size)
    if row["hybrid"]:
        y += BRACKET
        draw_brackets(picture, row, cells, y)
    picture.write(8, y + picture.cell / 2, f"{number}  {log.kind(row)}", weight="bold" if row["hybrid"] else "normal")
    picture.write(17, y + picture.cell + 7, log.verdict(row), SMALL)
    if not row["hybrid"]:
        advantage = row["advantage"]
        picture.write(17, y + picture.cell + 17, f"A = {log.signed(advantage)}", SMALL, log.sign_colour(advantage))
    if cells:
        picture.write(cells[-1].x + cells[-1].width + 5, y + picture.cell / 2, note, SMALL, FAINT)
    return draw_lanes(picture, row, cells, y) + BETWEEN


def draw_lanes(picture: Picture, row: Row, cells: list[Cell], top: float) -> float:
    """Draws the tokens at y coordinate `top`, and under them the lanes: whether each token is kept, its entropy and
    its weight. Returns the y coordinate at which the lanes end."""
    y = top + picture.cell + 1
    if log.drops(row):
        picture.write(LEFT - 4, y + KEPT / 2, "kept", 6.2, FAINT, ha="right")
    floor = y + KEPT * log.drops(row) + ENTROPY
    middle = floor + 1 + WEIGHT / 2
    picture.write(LEFT - 4, floor - 3, "entropy", 6.2, FAINT, ha="right")
    picture.write(LEFT - 4, middle, "weight", 6.2, FAINT, ha="right")
    framed = log.framed(row)
    for cell in cells:
        t = cell.index
        kept = bool(row["kept"][t])
        colour = log.SOURCES[log.source(row, t)][0] if kept else log.DROPPED
        looks = {"edge": INK, "weight": "bold"} if framed[t] else {}
        draw_cell(picture, cell, top, colour, ink=INK if kept else FAINT, **looks)
        x, width = cell.x + 0.4, cell.width - 0.8
        if log.drops(row):
            picture.box(cell.x + cell.width / 2 - 1.6, y + 1.4, 3.2, 3.2, INK if kept else "white", INK)
        bar = ENTROPY * row["entropy"][t] / picture.entropy_top
        picture.box(x, floor - bar, width, bar, "#8C8C8C")
        if share := row["weight"][t] / picture.weight_top:
            # each weight's bar has at least 12% of the full height, so that small weights are visible
            bar = WEIGHT / 2 * max(abs(share), 0.12)
            picture.box(x, middle - bar if share > 0 else middle, width, bar, log.sign_colour(share))
    if cells:
        picture.line([LEFT, cells[-1].x + cells[-1].width], [middle, middle])
    return middle + WEIGHT / 2


def draw_brackets(picture: Picture, row: Row, cells: list[Cell], y: float) -> None:
    """Draws brackets over the parts of a hybrid row, with the advantage of each part. `y` is the top of the row."""
    free = LEFT  # left edge of the free space for the next label
    for whose, words, advantage in log.parts(row):
        part = [cell for cell in cells if log.source(row, cell.index) == whose]
        if part:
            left, right = part[0].x + 0.8, part[-1].x + part[-1].width - 0.8
            picture.line([left, left, right, right], [y - 1.5, y - 3.5, y - 3.5, y - 1.5], INK)
            free = max(left, free)
        text = f"{words}, A = {log.signed(advantage)}"
        width = 0.6 * SMALL * len(text)
        if free + width > RIGHT:
            picture.write(RIGHT, y - 9, text, SMALL, ha="right")
        else:
            picture.write(free, y - 9, text, SMALL)
        free += width


# ---- the legend


def draw_legend(picture: Picture, y: float) -> float:
    """Draws the legend: the sources of tokens on the left, the lanes on the right, and the formula of the gradient
    below. Returns the height of the picture."""
    column, step = 330.0, 13.0
    picture.line([8, RIGHT], [y, y])
    y += 12
    sources, lanes = log.sources(picture.group), log.lanes(picture.group)
    for place, name in enumerate(sources):
        at = y + step * place
        picture.box(8, at - 5, 20, 10, log.SOURCES[name][0])
        picture.write(34, at, name, weight="bold")
        picture.write(LEFT + 4, at, log.SOURCES[name][1])
    for place, (name, words) in enumerate(lanes):
        picture.write(column, y + step * place, name, weight="bold")
        picture.write(column + 46, y + step * place, words)
    at = y + step * len(lanes)
    for place, (value, words) in enumerate(((1, "up: made more likely"), (-1, "down: made less likely"))):
        picture.box(column + 46 + 110 * place, at - 4, 8, 8, log.sign_colour(value))
        picture.write(column + 58 + 110 * place, at, words)
    y += step * max(len(sources), len(lanes) + 1)
    picture.write(8, y + 2, log.FORMULA, SMALL)
    return y + 14
