"""How the conflict page looks: colours of the heat map, and its style sheet for light and dark screens."""

from __future__ import annotations

STEPS = 10
"""Shades of the heat map; conflict 0 has the first, the top of the scale the last."""
_LIGHT = ("#fff7ec", "#fdd8a8", "#fc9a66", "#d7402a", "#7f0f12")
_DARK = ("#2b2422", "#5a3426", "#97462a", "#dd6a38", "#ffc796")
_INKS = ("#000000", "#ffffff")


def ramp(anchors: tuple[str, ...], n: int = STEPS) -> list[str]:
    """Blend colours evenly into n shades.

    >>> ramp(("#000000", "#ffffff"), 3)
    ['#000000', '#808080', '#ffffff']
    """
    points = [tuple(int(anchor[at : at + 2], 16) for at in (1, 3, 5)) for anchor in anchors]
    shades = []
    for step in range(n):
        place = step * (len(points) - 1) / (n - 1)
        at = min(int(place), len(points) - 2)
        mixed = [a + (place - at) * (b - a) for a, b in zip(points[at], points[at + 1], strict=True)]
        shades.append("#" + "".join(f"{int(value + 0.5):02x}" for value in mixed))
    return shades


def contrast(one: str, other: str) -> float:
    """Return the WCAG contrast of two colours, from 1 to 21.

    >>> contrast("#000000", "#ffffff")
    21.0
    """
    low, high = sorted((_luminance(one), _luminance(other)))
    return round((high + 0.05) / (low + 0.05), 2)


def _luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return float(sum(share * part for share, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True)))


def ink_on(colour: str) -> str:
    """Choose the text colour that reads best on a shade."""
    return max(_INKS, key=lambda ink: contrast(ink, colour))


def _shades(anchors: tuple[str, ...]) -> str:
    return "".join(f".s{n}{{background:{c};color:{ink_on(c)}}}" for n, c in enumerate(ramp(anchors)))


def style_sheet() -> str:
    """Return the page's style: no font, picture or script from elsewhere."""
    dark = f":root{{{_DARK_COLOURS}}}{_shades(_DARK)}"
    return f":root{{{_LIGHT_COLOURS}}}{_shades(_LIGHT)}@media (prefers-color-scheme:dark){{{dark}}}{_LAYOUT}"


_LIGHT_COLOURS = (
    "--page:#faf9f7;--card:#ffffff;--ink:#1b1a19;--soft:#5c5853;--line:#e3dfd9;--grid:#ece8e2;"
    "--route:#b8400e;--average:#1c63a8;--limit:#1b1a19"
)
_DARK_COLOURS = (
    "--page:#161514;--card:#1f1e1c;--ink:#f2efea;--soft:#b1aba3;--line:#383532;--grid:#2c2a28;"
    "--route:#ff9a5c;--average:#7db4ee;--limit:#f2efea"
)
_LAYOUT = """
:root{color-scheme:light dark}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1100px;margin:0 auto;padding:32px 20px 64px}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 8px;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:1.1rem;margin:0 0 4px}
p{margin:0 0 12px;max-width:72ch}
.soft,.scale,figcaption{color:var(--soft)}
.names{overflow-wrap:anywhere}
section,details{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:20px;margin-top:20px}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:24px 0 0}
.facts div{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 16px}
.facts dt{color:var(--soft);font-size:.85rem}
.facts dd{margin:2px 0 0;font-size:1.35rem;font-weight:600;line-height:1.25;overflow-wrap:anywhere}
.facts small{display:block;color:var(--soft);font-size:.8rem;font-weight:400}
.wide{overflow-x:auto;max-width:100%}
.wide:focus-visible{outline:2px solid var(--average);outline-offset:2px}
svg{display:block}
svg text{fill:var(--soft);font:12px system-ui,-apple-system,"Segoe UI",sans-serif;font-variant-numeric:tabular-nums}
.grid{stroke:var(--grid)}
.path{fill:none;stroke:var(--soft);stroke-opacity:.45;stroke-width:1.5}
.limit{stroke:var(--limit);stroke-width:1.5;stroke-dasharray:5 4}
svg text.told{fill:var(--ink)}
.route .mark{fill:var(--route);stroke:var(--card);stroke-width:1.5}
.average .mark{fill:var(--card);stroke:var(--average);stroke-width:2}
.point:hover .mark{stroke:var(--ink);stroke-width:2.5}
.hit{fill:transparent}
.key{display:flex;flex-wrap:wrap;gap:4px 18px;list-style:none;margin:8px 0 0;padding:0;color:var(--soft)}
.key li{display:flex;align-items:center;gap:6px}
table{border-collapse:separate;border-spacing:2px;font-variant-numeric:tabular-nums;font-size:.9rem}
th{font-weight:500;color:var(--soft);text-align:left;white-space:nowrap;padding:3px 8px}
thead th{vertical-align:bottom}
tbody th{position:sticky;left:0;background:var(--card);z-index:1}
td{padding:3px 8px;text-align:right;white-space:nowrap;border-radius:3px;min-width:3.2em}
td.cell{text-align:center;position:relative}
td.cell:hover{outline:2px solid var(--ink);outline-offset:-1px}
td.cell:hover::after{content:attr(data-tip);position:absolute;left:50%;bottom:calc(100% + 4px);
transform:translateX(-50%);background:var(--ink);color:var(--page);
padding:4px 9px;border-radius:6px;font-size:.8rem;z-index:3;pointer-events:none}
tbody tr:first-child td.cell:hover::after{bottom:auto;top:calc(100% + 4px)}
tbody tr:hover th{color:var(--ink)}
td.none{color:var(--soft);text-align:center}
td.score{font-weight:600}
td.what{text-align:left}
td.route{color:var(--route);font-weight:600}
td.average{color:var(--average)}
.scale{display:flex;align-items:center;gap:8px;font-size:.85rem;margin:4px 0 12px;flex-wrap:wrap}
.scale i{display:inline-flex}
.scale b{width:18px;height:14px;display:block}
.list{width:100%}
.list td,.list th{text-align:left;white-space:normal;overflow-wrap:anywhere;position:static;vertical-align:top}
.list .number{text-align:right;white-space:nowrap}
summary{cursor:pointer;font-weight:600}
pre{overflow-x:auto;font-size:.85rem;margin:12px 0 0}
footer{color:var(--soft);font-size:.85rem;margin-top:24px}
.unseen{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap}
@media (max-width:560px){main{padding:20px 12px 40px}section,details{padding:14px}h1{font-size:1.4rem}}
@media print{body{background:#fff}section,details{break-inside:avoid}}
"""
