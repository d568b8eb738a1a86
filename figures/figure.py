"""What all figures share: colours, type sizes, the file they are written to.

Figures are made without pyplot, so that a notebook's own backend stays as it is. They are 9 inches wide: shown 900
pixels wide, as in a README, 1 pt is 1.4 pixels.
"""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from support.errors import InputError
from support.files import writing

WIDTH = 9.0  # inches
COLUMNS = 3
DPI = 200
FORMATS = (".png", ".pdf", ".svg", ".jpg")  # matplotlib's others need more than Python (.pgf needs LaTeX)
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, "#000000")  # for the colour-blind too (Okabe and Ito 2008)
STYLES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # beside colours, where lines of one panel are to be told apart
TYPE = {  # of matplotlib.rc_context
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.labelsize": 8,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5,
    "legend.framealpha": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,  # in names of runs, levels and benchmarks a $ is a dollar
    "axes.prop_cycle": f"cycler('color', {list(COLOURS)})",
}


def sheet(
    panels: int, panel_height: float, wide_first: bool = False, most: int = COLUMNS, **kwargs: object
) -> tuple[Figure, list[Axes]]:
    """A figure with room for so many panels, as one list, row by row, at most `most` beside each other; wide_first
    gives the first two columns of a row of its own (the third is for its legend). `kwargs` are those of a subplot."""
    columns = COLUMNS if wide_first else min(most, panels)
    begin = columns * wide_first  # the first place of a panel of one column
    rows = -(-(begin + panels - wide_first) // columns)
    figure = Figure(figsize=(WIDTH if columns > 1 else WIDTH / 2, panel_height * rows), layout="constrained")
    grid = figure.add_gridspec(rows, columns)
    spots = [grid[0, : COLUMNS - 1]] * wide_first
    spots += [grid[divmod(place, columns)] for place in range(begin, begin + panels - wide_first)]
    return figure, [figure.add_subplot(spot, **kwargs) for spot in spots]


def in_percent(share: float, _: object = None) -> str:
    """A share at a tick of an axis whose label says "%"."""
    return f"{100 * share:.4g}"


def check_target(target: Path, formats: tuple[str, ...] = FORMATS) -> None:
    """InputError if no figure of one of the `formats` can be written to `target`."""
    if target.is_dir():
        raise InputError(f"{target} is a folder: name the figure's file, for example --out {target / 'curves.png'}")
    if target.suffix and target.suffix.lower() not in formats:
        kinds = ", ".join(formats)
        raise InputError(f"{target}: a figure is not written as {target.suffix}: end its name with one of {kinds}")
    above = next(parent for parent in target.absolute().parents if parent.exists())
    if not above.is_dir():
        raise InputError(f"{target}: {above} is a file, not a folder: choose another --out")


def save(figure: Figure, target: Path) -> Path:
    """Write the figure whole or not at all; its folder is made where there is none."""
    partial = target.with_name(f"{target.stem}.partial{target.suffix or '.png'}")
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            figure.savefig(partial, dpi=DPI)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    return target
