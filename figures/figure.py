"""This file has what all drawing code of the project uses: colours, type sizes, the grid of panels, and writing an
image file.

Figures are drawn without pyplot, because pyplot can change the matplotlib backend of a notebook. A figure is 9 inches
wide, and a README shows it 900 pixels wide. So a type size of 1 point becomes 1.4 pixels.
"""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from support.errors import InputError
from support.files import writing

WIDTH = 9.0  # inches
COLUMNS = 3
DPI = 200
# Figures have these formats, because others of matplotlib need programs beside Python (.pgf needs LaTeX).
FORMATS = (".png", ".pdf", ".svg", ".jpg")
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
# Colour-blind readers can tell the colours below apart (Okabe and Ito 2008).
COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, "#000000")
STYLES = ("-", "--", ":", "-.")
# markers, used in addition to colours and line styles in panels with several lines
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
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
    "text.parse_math": False,  # without parsing, a $ in the name of a run, level or benchmark is printed as it is
    "axes.prop_cycle": f"cycler('color', {list(COLOURS)})",
}


def sheet(
    panels: int, panel_height: float, wide_first: bool = False, most: int = COLUMNS, **kwargs: object
) -> tuple[Figure, list[Axes]]:
    """Returns a figure and its list of `panels` subplots, at most `most` side by side.

    With wide_first the first panel alone fills the top row of the grid: two columns for the panel, the third for its
    legend. `kwargs` are passed to matplotlib's add_subplot.
    """
    columns = COLUMNS if wide_first else min(most, panels)
    begin = columns * wide_first  # index of the grid cell of the first panel that is one column wide
    rows = -(-(begin + panels - wide_first) // columns)
    figure = Figure(figsize=(WIDTH if columns > 1 else WIDTH / 2, panel_height * rows), layout="constrained")
    grid = figure.add_gridspec(rows, columns)
    spots = [grid[0, : COLUMNS - 1]] * wide_first
    spots += [grid[divmod(place, columns)] for place in range(begin, begin + panels - wide_first)]
    return figure, [figure.add_subplot(spot, **kwargs) for spot in spots]


def in_percent(share: float, _: object = None) -> str:
    """Returns the tick label of a share, in percent without the % sign, for an axis whose label has "%"."""
    return f"{100 * share:.4g}"


def check_target(target: Path, formats: tuple[str, ...] = FORMATS) -> None:
    """Raises InputError if `target` is a folder, lies below a file, or does not end in one of `formats`."""
    if target.is_dir():
        raise InputError(f"{target} is a folder: name a figure file, for example --out {target / 'curves.png'}")
    if target.suffix and target.suffix.lower() not in formats:
        kinds = ", ".join(formats)
        raise InputError(f"{target}: a figure cannot be written as {target.suffix}: end the name with one of {kinds}")
    above = next(parent for parent in target.absolute().parents if parent.exists())
    if not above.is_dir():
        raise InputError(f"{target}: {above} is a file, not a folder: choose another --out")


def save(figure: Figure, target: Path) -> Path:
    """Writes the figure to `target` completely or not at all. Makes the folder of `target` if it is missing."""
    partial = target.with_name(f"{target.stem}.partial{target.suffix or '.png'}")
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            figure.savefig(partial, dpi=DPI)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    return target
