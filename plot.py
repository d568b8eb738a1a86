"""This command draws figures: curves of runs, a group of rollouts token by token, a web page, and evaluations.

    python plot.py runs/prefix-rft-001                           -> runs/prefix-rft-001/curves.png
    python plot.py runs/rft-001 runs/prefix-rft-001              -> curves.png and a table of several runs
    python plot.py --group runs/prefix-rft-001 [STEP]            -> group-STEP.png in that folder
    python plot.py --page data/base runs/prefix-rft-001          -> page.html, the method in a browser
    python plot.py --compare evals/a evals/b [--beside-paper]    -> compare.png, and tables of evaluations

The code that draws is in figures/curves.py, figures/comparison.py, figures/group_*.py and figures/page.py.
"""

from pathlib import Path

from evaluation.report import compare_tables, read_results
from figures.comparison import draw_pass_at_k
from figures.curves import compare_runs, draw
from figures.figure import FORMATS, check_target
from figures.group_figure import draw_group
from figures.group_log import read_group
from figures.page import is_run, page_content, page_html
from reward import RewardError
from support.checkpoint import write_text
from support.command import Parser, command
from support.errors import InputError


def plot_runs(folders: list[Path], out: Path | None) -> None:
    """Draw the curves of one run into its folder. For several runs, print a table of the runs and draw all curves
    into the current folder."""
    target = out or (folders[0] / "curves.png" if len(folders) == 1 else Path("curves.png"))
    if len(folders) > 1:
        print(compare_runs(folders))
    print(draw(folders, target))


def plot_group(words: list[str], out: Path | None) -> None:
    """Draw the group of rollouts that a run recorded at a step; the last recorded group if `words` (RUN [STEP]) name
    no step."""
    folder, step = Path(words[0]), words[1] if len(words) > 1 else None
    if len(words) > 2 or (step and not step.isdecimal()):
        raise InputError(f"--group takes a run folder and a step, found {' '.join(words)!r}: --group RUN [STEP]")
    group = read_group(folder, int(step) if step else None)
    print(draw_group(group, out or folder / f"group-{group['step']}.png"))


def write_page(folders: list[Path], problem: str | None, out: Path | None) -> None:
    """Write a page for the browser. The page shows one problem, rollouts of each model on this problem, and the token
    weights of every method."""
    target = out or (folders[0] / "page.html" if is_run(folders[0]) else Path("page.html"))
    page = page_html(page_content(folders, problem))
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, page)
    print(target)


def plot_evaluations(folders: list[Path], out: Path | None, beside_paper: bool) -> None:
    print(compare_tables([read_results(folder) for folder in folders], beside_paper))
    print(draw_pass_at_k(folders, out or Path("compare.png"), with_accuracy=True))


@command("plot.py", shown=RewardError)
def main() -> None:
    parser = Parser(
        description="Draw the curves of runs, a group of rollouts, a page for the browser, or compare evaluations.",
    )
    parser.add_argument(
        "folders", nargs="*", type=Path, metavar="FOLDER", help="folders of runs, or of evaluations with --compare"
    )
    parser.add_argument("--group", nargs="+", metavar="RUN", help="RUN [STEP]: draw the group of RUN at STEP")
    parser.add_argument(
        "--page",
        action="store_true",
        help="write a page for the browser about one problem; the folders are runs or models",
    )
    parser.add_argument("--problem", metavar="ID", help="with --page: the id of a problem that has a demonstration")
    parser.add_argument("--compare", action="store_true", help="compare evaluations; each FOLDER is one evaluation")
    parser.add_argument("--beside-paper", action="store_true", help="with --compare: add the paper's results")
    parser.add_argument(
        "--out",
        type=Path,
        help="file of the figure (default: curves.png, group-STEP.png or page.html in the run's folder; "
        "curves.png of several runs and compare.png in the current folder)",
    )
    args = parser.parse_args()
    if args.out:
        check_target(args.out, (".html",) if args.page else FORMATS)
    resolved = [folder.resolve() for folder in args.folders]
    if twice := [folder for i, folder in enumerate(args.folders) if resolved[i] in resolved[:i]]:
        raise InputError(f"folder {twice[0]} is given twice: name each folder once")
    if args.beside_paper and not args.compare:
        raise InputError("--beside-paper needs --compare and evaluation folders")
    if args.problem and not args.page:
        raise InputError("--problem needs --page and a run or a model")
    if bool(args.group) == bool(args.folders) or bool(args.group) + args.compare + args.page > 1:
        raise InputError("give run folders, or --group RUN [STEP], or --page or --compare and folders")
    if args.group:
        plot_group(args.group, args.out)
    elif args.page:
        write_page(args.folders, args.problem, args.out)
    elif args.compare:
        plot_evaluations(args.folders, args.out, args.beside_paper)
    else:
        plot_runs(args.folders, args.out)


if __name__ == "__main__":
    main()
