"""The page's style, light or dark by system preference. All colors have a contrast of 3:1 to the background."""

LIGHT = ("#0b62b0", "#c1470b", "#0a7a52", "#9a3a9a", "#7d6400", "#b3263f", "#1f7f8c", "#5d5d66")
DARK = ("#62b2ff", "#ff9a5c", "#41cf9a", "#e291e2", "#e0c14a", "#ff8095", "#5fd0de", "#b4b4be")
DASHES = ((), (7, 3), (2, 2.5), (9, 3, 2, 3)) * 2


def _variables(colors: tuple[str, ...]) -> str:
    return "".join(f"--c{index}:{color};" for index, color in enumerate(colors))


def _classes() -> str:
    found = []
    for index, dash in enumerate(DASHES):
        lengths = " ".join(map(str, dash)) or "none"
        found.append(f".s{index}{{stroke:var(--c{index});stroke-dasharray:{lengths}}}.f{index}{{fill:var(--c{index})}}")
    return "\n".join(found)


CSS = f"""
:root{{color-scheme:light dark;--ground:#fff;--panel:#f6f7f9;--text:#1a1b1f;--soft:#5a5d66;--rule:#d9dce2;
--shade:rgba(40,60,100,.055);--hover:rgba(40,60,100,.13);{_variables(LIGHT)}}}
@media (prefers-color-scheme:dark){{:root{{--ground:#15161a;--panel:#1d1f25;--text:#e8e9ed;--soft:#a3a7b2;
--rule:#363943;--shade:rgba(170,190,255,.07);--hover:rgba(190,205,255,.16);{_variables(DARK)}}}}}
*{{box-sizing:border-box}}
body{{margin:0 auto;max-width:1240px;padding:28px 24px 60px;background:var(--ground);color:var(--text);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}}
h1{{font-size:25px;margin:0 0 2px}}h2{{font-size:18px;margin:34px 0 10px}}h3{{font-size:15px;margin:0}}
p.lead,p.note{{margin:0 0 14px;color:var(--soft)}}
figure{{margin:0 0 16px;padding:12px 14px 8px;background:var(--panel);border-radius:8px;min-width:0}}
figcaption{{display:flex;flex-wrap:wrap;gap:4px 18px;align-items:baseline}}
.grid2{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(460px,100%),1fr));gap:16px}}
.grid2 figure{{margin:0}}
svg{{display:block;width:100%;height:auto}}
.line{{fill:none}}
.tools{{position:sticky;top:0;z-index:200;display:flex;flex-wrap:wrap;gap:4px 18px;align-items:center;margin:0 0 8px;
padding:6px 0;background:var(--ground);font-size:13px;color:var(--soft)}}
.tools label{{display:inline-flex;align-items:center;gap:8px}}
button{{font:13px system-ui,sans-serif;padding:1px 12px;border:1px solid var(--rule);border-radius:12px;
color:var(--soft);background:var(--ground);cursor:pointer}}figcaption button{{margin-left:auto}}
.uplot{{width:100%;font:inherit}}.u-legend{{font-size:12px;color:var(--soft);text-align:left;margin-top:4px}}
.u-legend th,.u-legend td{{padding:1px 3px;border:0;white-space:normal}}.u-inline tr{{margin-right:14px}}
.u-legend .u-series:first-child{{display:block}}.u-legend .u-series:first-child th{{display:none}}
.u-legend .raw{{display:none}}.u-select{{background:var(--hover)}}
.u-cursor-x,.u-cursor-y{{border-color:var(--soft)!important}}
{_classes()}
.part{{stroke:var(--ground);stroke-width:1}}
svg.bar{{height:16px;max-width:420px;border-radius:3px;margin:4px 0}}
.legend{{display:inline-flex;align-items:center;gap:6px;font-size:13px;color:var(--soft)}}
svg.key{{width:26px;height:12px;flex:none}}
.table{{overflow-x:auto;margin:0 0 16px}}
table{{border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums;width:100%}}
th,td{{padding:4px 12px 4px 0;border-bottom:1px solid var(--rule);text-align:left;vertical-align:top}}
th{{font-weight:600;color:var(--soft);white-space:nowrap}}thead th{{border-bottom:2px solid var(--rule)}}
td.n,th.n{{text-align:right;white-space:nowrap}}tr.first td,tr.first th{{border-top:2px solid var(--rule)}}
.grid2{{margin:8px 0 16px}}.runs th:first-child{{width:150px}}code{{font-size:13px}}
pre{{overflow:auto;max-height:480px;padding:12px;background:var(--panel);border-radius:8px;font-size:12px}}
summary{{cursor:pointer;color:var(--soft)}}
"""
