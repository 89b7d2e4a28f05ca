"""How a report looks: colours that stay the same for a policy throughout, for light and for dark screens."""

from __future__ import annotations

from typing import Final

_LIGHT: Final = (
    "#1d5fd1",
    "#e0670b",
    "#138a4e",
    "#8b3fc7",
    "#0b93a6",
    "#c9256f",
    "#8a6a0a",
    "#6b7280",
    "#5c8f0a",
    "#c0392b",
)
_DARK: Final = (
    "#6ea8ff",
    "#ff9a4d",
    "#4fd08a",
    "#c58bff",
    "#45cfe0",
    "#ff7ab2",
    "#e0be4c",
    "#a3abb8",
    "#a8d94a",
    "#ff7b6b",
)
_DASHES: Final = ("none", "7 4", "2 3")
"""Policies beyond the colours take them again, dashed."""
_STAGES: Final = ((0x6F, 0xBF, 0xB8), (0xF0, 0xC0, 0x4A), (0xEE, 0x80, 0x3B), (0xCF, 0x47, 0x5D), (0x8C, 0x33, 0x80))
"""From the first stage to the last: the later a request is dropped, the more has been spent on it."""

_BASE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #ffffff; --ink: #1a1f28; --soft: #5b6472; --rule: #e2e5ea;
  --load: #c8cfda; --edge: #2a2f3a; --point: rgba(20, 40, 80, .09); --other: #9aa1ac; --best: rgba(29, 95, 209, .10); }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
header, main { max-width: 1280px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 26px; }
h1 { font-size: 25px; margin: 0 0 6px; letter-spacing: -.01em; }
h2 { font-size: 20px; margin: 30px 0 2px; letter-spacing: -.01em; }
h3 { font-size: 15px; margin: 0; }
p { margin: 4px 0; }
.soft, figcaption p { color: var(--soft); }
figcaption p { font-size: 13px; margin: 0 0 8px; }
pre { margin: 8px 0 0; padding: 9px 12px; background: var(--card); border: 1px solid var(--rule); border-radius: 8px;
  font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.legend { position: sticky; top: 0; z-index: 1; background: var(--page); border-bottom: 1px solid var(--rule); }
.legend form { max-width: 1280px; margin: 0 auto; padding: 10px 20px 8px; display: flex; flex-wrap: wrap;
  gap: 4px 18px; align-items: center; font-size: 14px; }
.legend label { display: inline-flex; align-items: center; gap: 6px; cursor: pointer; }
.legend input { margin: 0; accent-color: var(--policy); }
.key { display: inline-block; width: 22px; height: 0; border-top: 3px solid var(--policy); }
.key.load { height: 11px; border: 0; background: var(--load); border-radius: 2px; }
.key.bound { border-top: 2px dashed var(--edge); }
.square { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 5px; }
.facts { display: flex; flex-wrap: wrap; gap: 10px; margin: 12px 0 14px; padding: 0; }
.facts div { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 7px 13px; }
.facts dt { font-size: 12px; color: var(--soft); }
.facts dd { margin: 0; font-weight: 600; font-variant-numeric: tabular-nums; }
.facts small { font-weight: 400; color: var(--soft); }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 14px 16px 10px;
  margin: 0 0 16px; min-width: 0; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(480px, 100%), 1fr)); gap: 0 16px; }
.many { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(var(--least), 100%), 1fr)); gap: 6px 12px; }
.many h4 { font-size: 12.5px; font-weight: 600; margin: 0; padding-left: 14px; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { padding: 5px 10px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule); }
th { font-size: 12.5px; font-weight: 600; color: var(--soft); vertical-align: bottom; }
th small { display: block; font-weight: 400; }
th:first-child, td:first-child { text-align: left; }
tr:last-child td { border-bottom: 0; }
td.best { font-weight: 700; background: var(--best); }
td .key { margin-right: 8px; vertical-align: middle; }
details { margin: 8px 0 2px; font-size: 13.5px; color: var(--soft); }
summary { cursor: pointer; }
dl.words { display: grid; grid-template-columns: max-content 1fr; gap: 3px 14px; margin: 8px 0; }
dl.words dt { font-weight: 600; } dl.words dd { margin: 0; }
svg { display: block; width: 100%; height: auto; }
svg text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; fill: var(--soft);
  font-variant-numeric: tabular-nums; }
svg text.row { fill: var(--ink); font-size: 13px; }
svg text.marked { fill: var(--edge); paint-order: stroke; stroke: var(--card); stroke-width: 3px; }
.grid { stroke: var(--rule); stroke-width: 1; } .axis { stroke: var(--soft); stroke-width: 1; }
.mark { stroke: var(--edge); stroke-width: 1; stroke-dasharray: 2 3; }
.curve { fill: none; stroke: var(--policy); stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round;
  stroke-dasharray: var(--dash); }
.many .curve { stroke-width: 1.4; }
.area.load { fill: var(--load); opacity: .6; }
.curve.bound { stroke: var(--edge); stroke-width: 1.6; stroke-dasharray: 6 4; }
.band { fill: transparent; } .band:hover { fill: var(--point); }
.other { fill: var(--other); background: var(--other); }
.stages { display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: 13px; margin: 0 0 4px; }
footer { color: var(--soft); font-size: 13px; padding: 6px 0 30px; }
"""

_BASE_DARK = """
:root { --page: #12151b; --card: #1a1e26; --ink: #e8ebf0; --soft: #9aa4b4; --rule: #2c323d; --load: #3b4352;
  --edge: #e8ebf0; --point: rgba(160, 190, 255, .14); --other: #6b7280; --best: rgba(110, 168, 255, .14); }
"""


def style_sheet(policies: int, stages: int) -> str:
    """CSS for a report: classes ``p0``, ``p1``, ... for so many policies, which checkboxes of the ids ``show0``, ...
    hide and the labels of the classes ``of0``, ... single out; ``g0``, ``g1``, ... for the most stages that a pipeline
    has."""
    rules, dark = [_BASE], [_BASE_DARK]
    for index in range(policies):
        colour, dash = index % len(_LIGHT), _DASHES[index // len(_LIGHT) % len(_DASHES)]
        rules.append(f".p{index} {{ --policy: {_LIGHT[colour]}; --dash: {dash}; }}")
        dark.append(f".p{index} {{ --policy: {_DARK[colour]}; }}")
        rules.append(f"body:has(#show{index}:not(:checked)) main .p{index} {{ display: none; }}")
        rules.append(f"body:has(.of{index}:hover) .curve[class*=' p']:not(.p{index}) {{ opacity: .12; }}")
    for index in range(stages):
        rules.append(
            f".g{index} {{ fill: {_stage_colour(index, stages)}; background: {_stage_colour(index, stages)}; }}"
        )
    return "\n".join([*rules, "@media (prefers-color-scheme: dark) {", *dark, "}"])


def _stage_colour(index: int, stages: int) -> str:
    place = index / (stages - 1) * (len(_STAGES) - 1) if stages > 1 else 0.0
    low = min(int(place), len(_STAGES) - 2)
    part = place - low
    mixed = (round(a + (b - a) * part) for a, b in zip(_STAGES[low], _STAGES[low + 1], strict=True))
    return "#" + "".join(f"{value:02x}" for value in mixed)
