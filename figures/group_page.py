"""One group of rollouts as a web page: as figures/group_figure.py draws it, with a token's numbers on hover.

The page stands alone: no server, no network, no script. What stands in a group (problems, tokens, names) is text
written by others, so every character of it is escaped, and the page's own policy forbids scripts and requests.
A notebook shows it with IPython.display.HTML(group_html(group)): all styles are those of its class prefix-rft-group.
"""

from html import escape

from figures import group_log as log
from figures.group_log import Group, Row

ENTROPY, WEIGHT = 12, 18  # heights of the lanes in pixels
STYLE = (
    f"""
.prefix-rft-group .e {{ height: {ENTROPY}px; }}
.prefix-rft-group .w {{ height: {WEIGHT}px; }}"""
    + """
.prefix-rft-group { color: #222; background: #fff; padding: 12px; font: 14px/1.4 system-ui, sans-serif; }
.prefix-rft-group h1 { font-size: 20px; margin: 0 0 4px; }
.prefix-rft-group p { margin: 0 0 14px; }
.prefix-rft-group .row { display: flex; position: relative; margin-bottom: 14px; }
.prefix-rft-group .name { flex: 0 0 104px; font-size: 12px; }
.prefix-rft-group .hybrid .name b { font-weight: 700; }
.prefix-rft-group .name b { font-weight: 400; font-size: 13px; }
.prefix-rft-group .name span { display: block; padding-left: 14px; }
.prefix-rft-group .lanes { flex: 0 0 46px; font-size: 11px; line-height: 12px; color: #6b6b6b; text-align: right;
  padding: 21px 6px 0 0; }
.prefix-rft-group .hybrid .lanes { padding-top: 41px; }
.prefix-rft-group .lanes span { display: block; height: 13px; }
.prefix-rft-group .lanes .kept { height: 10px; line-height: 9px; }
.prefix-rft-group .tokens { flex: 1; display: flex; flex-wrap: wrap; row-gap: 6px; align-content: flex-start; }
.prefix-rft-group .parts { font-size: 12px; width: 100%; margin-bottom: -3px; }
.prefix-rft-group .parts span { padding: 0 6px; margin: 0 8px 0 .5px; }
.prefix-rft-group .t { display: block; cursor: default; }
.prefix-rft-group .t b { display: block; font: 13px/20px ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace;
  padding: 0 1px; margin: 0 .5px; min-width: 9px; text-align: center; white-space: pre; unicode-bidi: isolate;
  box-sizing: border-box; }
.prefix-rft-group .t.chosen b { font-weight: 700; box-shadow: inset 0 0 0 1.5px #222; }
.prefix-rft-group .t.dropped b { color: #6b6b6b; }
.prefix-rft-group .k { display: block; height: 5px; width: 5px; margin: 3px auto 2px; border: 1px solid #222;
  box-sizing: border-box; }
.prefix-rft-group .kept .k { background: #222; }
.prefix-rft-group .e, .prefix-rft-group .w { display: block; position: relative; margin-top: 1px; }
.prefix-rft-group .e i, .prefix-rft-group .w i { position: absolute; left: .5px; right: .5px; }
.prefix-rft-group .e i { bottom: 0; background: #8c8c8c; }
.prefix-rft-group .w { background: linear-gradient(#bbb, #bbb) center / 100% 1px no-repeat; }
.prefix-rft-group .t:hover b { outline: 2px solid #222; }
.prefix-rft-group .t:hover::after { content: attr(data-said); position: absolute; left: 150px; top: 100%; z-index: 1;
  background: #222; color: #fff; padding: 3px 8px; border-radius: 3px; font-size: 13px; white-space: pre-wrap; }
.prefix-rft-group .more { align-self: flex-start; padding: 2px 8px; color: #6b6b6b; }
.prefix-rft-group .legend { border-top: 1px solid #bbb; padding-top: 10px; display: grid; gap: 2px 14px;
  grid-template-columns: auto auto auto 1fr; font-size: 13px; align-items: baseline; }
.prefix-rft-group .swatch { padding: 0 8px; font-weight: 700; }
.prefix-rft-group .scale { display: inline-block; width: 120px; height: 11px; margin: 0 6px; }
.prefix-rft-group .formula { margin: 10px 0 0; font-size: 12px; }
"""
)


def group_html(group: Group) -> str:
    """A whole HTML document (group_log.py says what a group is)."""
    name = escape(log.title(group))
    rows = "\n".join(row_html(group, row, number) for number, row in enumerate(group["rows"], 1))
    prompt = "".join(
        f'<span class="t"><b style="background:{log.SOURCES["prompt"][0]}">{escape(log.visible(t))}</b></span>'
        for t in group["prompt"]
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>{name}</title>
<style>{STYLE}</style>
</head>
<body style="margin:0">
<div class="prefix-rft-group">
<h1>{name}</h1>
<p>{escape(log.summary(group))} Hover over a token to see its numbers.</p>
<div class="row"><div class="name"><b>prompt</b></div><div class="lanes"></div>
<div class="tokens">{prompt}<span class="more">right answer: {escape(group["answer"])}</span></div></div>
{rows}
{legend_html(group)}
<p class="formula">{escape(log.FORMULA)}</p>
</div>
</body>
</html>
"""


def row_html(group: Group, row: Row, number: int) -> str:
    """A row: its name and verdict, the names of its lanes, its tokens."""
    said = [f"<b>{number}&ensp;{log.kind(row)}</b>", f"<span>{escape(log.verdict(row))}</span>"]
    if not row["hybrid"]:
        ink = log.SIGN_INK[(row["advantage"] > 0) - (row["advantage"] < 0)]
        said.append(f'<span style="color:{ink}">A = {log.signed(row["advantage"])}</span>')
    lanes = '<span class="kept">kept</span>' * log.drops(row) + "<span>entropy</span><span>weight</span>"
    parts = "".join(
        f'<span style="background:{log.SOURCES[whose][0]}">{escape(words)}, A = {log.signed(advantage)}</span>'
        for whose, words, advantage in log.parts(row)
    )
    framed, tops = log.chosen(row), log.scales(group)
    tokens = f'<div class="parts">{parts}</div>' if row["hybrid"] else ""
    tokens += "".join(token_html(row, t, framed[t], tops) for t in range(len(row["tokens"])))
    rest = row["tokens_total"] - len(row["tokens"])
    more = f'<span class="more">… {rest} more</span>' if rest > 0 else ""
    return (
        f'<div class="row{" hybrid" * row["hybrid"]}"><div class="name">{"".join(said)}</div>'
        f'<div class="lanes">{lanes}</div><div class="tokens">{tokens}{more}</div></div>'
    )


def token_html(row: Row, t: int, framed: bool, tops: tuple[float, float]) -> str:
    """A token's cell over its place in the lanes, and what is said of it on hover."""
    kept, (entropy_top, weight_top) = bool(row["kept"][t]), tops
    colour = log.SOURCES[log.source(row, t)][0] if kept else log.DROPPED
    classes = "t " + ("kept" if kept else "dropped") + " chosen" * framed
    said = (
        f"{row['tokens'][t]!r}   id {row['ids'][t]}   {log.source(row, t)}   entropy {row['entropy'][t]:.3f} nats   "
        f"{'kept' if kept else 'dropped'}   w = {log.signed(row['weight'][t])}"
    )
    mark = '<i class="k"></i>' if log.drops(row) else ""
    bar = ENTROPY * row["entropy"][t] / entropy_top
    share = row["weight"][t] / weight_top
    half = WEIGHT / 2 * max(abs(share), 0.12 * bool(share))  # a small weight is still seen
    side = "bottom" if share > 0 else "top"
    return (
        f'<span class="{classes}" data-said="{escape(said)}"><b style="background:{colour}">'
        f"{escape(log.visible(row['tokens'][t]))}</b>{mark}"
        f'<i class="e"><i style="height:{bar:.1f}px"></i></i>'
        f'<i class="w"><i style="height:{half:.1f}px;{side}:50%;background:{log.weight_colour(share)}"></i></i>'
        "</span>"
    )


def legend_html(group: Group) -> str:
    """Sources beside lanes, as in the picture."""
    _, top = log.scales(group)
    left = [
        f'<span class="swatch" style="background:{colour}">{name}</span><span>{words}</span>'
        for name, (colour, words) in log.SOURCES.items()
        if name in log.sources(group)
    ]
    right = [f"<b>{name}</b><span>{escape(words)}</span>" for name, words in log.lanes(group)]
    steps = ", ".join(log.weight_colour(place / 10) for place in range(-10, 11))
    right.append(
        f"<b></b><span>{log.signed(-top)}"
        f'<span class="scale" style="background:linear-gradient(90deg, {steps})"></span>'
        f"{log.signed(top)}&emsp;red: made less likely, blue: more</span>"
    )
    left += ["<span></span><span></span>"] * (len(right) - len(left))
    right += ["<span></span><span></span>"] * (len(left) - len(right))
    return f'<div class="legend">{"".join(a + b for a, b in zip(left, right))}</div>'
