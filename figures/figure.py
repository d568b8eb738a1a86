"""What all figures share: colours, type sizes, and the file they are written to.

Figures are made without pyplot, so that a notebook's own backend stays as it is. They are 9 inches wide. Shown 900
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
# matplotlib's other formats need programs beside Python (.pgf needs LaTeX)
FORMATS = (".png", ".pdf", ".svg", ".jpg")
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
# colours that the colour-blind can tell apart (Okabe and Ito 2008)
COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, "#000000")
STYLES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # line styles, used beside colours in panels with several lines
TYPE = {  # settings for matplotlib.rc_context
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.labelsize": 8,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5,
    "legend.framealpha": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,  # a $ in the name of a run, level or benchmark is a dollar, not mathematics
    "axes.prop_cycle": f"cycler('color', {list(COLOURS)})",
}


def sheet(
    panels: int, panel_height: float, wide_first: bool = False, most: int = COLUMNS, **kwargs: object
) -> tuple[Figure, list[Axes]]:
    """Returns a figure and its list of `panels` subplots, at most `most` in a row.

    wide_first gives the first panel two columns of its own row; the third column is for its legend. `kwargs` are
    those of a subplot.
    """
    columns = COLUMNS if wide_first else min(most, panels)
    begin = columns * wide_first  # index of the first panel with one column
    rows = -(-(begin + panels - wide_first) // columns)
    figure = Figure(figsize=(WIDTH if columns > 1 else WIDTH / 2, panel_height * rows), layout="constrained")
    grid = figure.add_gridspec(rows, columns)
    spots = [grid[0, : COLUMNS - 1]] * wide_first
    spots += [grid[divmod(place, columns)] for place in range(begin, begin + panels - wide_first)]
    return figure, [figure.add_subplot(spot, **kwargs) for spot in spots]


def in_percent(share: float, _: object = None) -> str:
    """Returns a share as the text of a tick, for an axis whose label says "%"."""
    return f"{100 * share:.4g}"


def check_target(target: Path, formats: tuple[str, ...] = FORMATS) -> None:
    """Raises InputError if no figure in one of the `formats` can be written to `target`."""
    if target.is_dir():
        raise InputError(f"{target} is a folder: name the figure's file, for example --out {target / 'curves.png'}")
    if target.suffix and target.suffix.lower() not in formats:
        kinds = ", ".join(formats)
        raise InputError(f"{target}: a figure is not written as {target.suffix}: end its name with one of {kinds}")
    above = next(parent for parent in target.absolute().parents if parent.exists())
    if not above.is_dir():
        raise InputError(f"{target}: {above} is a file, not a folder: choose another --out")


def save(figure: Figure, target: Path) -> Path:
    """Write the figure whole or not at all, and make its folder if it is not there."""
    partial = target.with_name(f"{target.stem}.partial{target.suffix or '.png'}")
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            figure.savefig(partial, dpi=DPI)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    return target
