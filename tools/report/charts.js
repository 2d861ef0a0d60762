// Draws the page's charts with uPlot: curves over tokens with stages shaded, hover, zoom in all charts at once,
// smoothing, logarithmic axes. The data are the JSON in #data (charts.py).
"use strict";

const page = JSON.parse(document.getElementById("data").textContent);
const charts = [];
let smoothing = 0;
let range = null; // the zoomed tokens; null for all

const color = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function short(value) {
  if (value === 0) return "0";
  for (const [size, unit] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "K"]])
    if (Math.abs(value) >= size * 0.9995) return `${+(value / size).toPrecision(4)}${unit}`;
  return Math.abs(value) < 0.01 ? (+value.toPrecision(3)).toExponential().replace("e+", "e") : `${+value.toPrecision(4)}`;
}

const forms = { short, percent: value => `${+(100 * value).toPrecision(3)}%`, loss: value => value.toFixed(4) };

// An exponential moving average that starts at the first value (Kingma and Ba 2015, section 3).
function smoothed(values) {
  let mean = 0, weight = 0;
  return values.map(value => {
    mean = smoothing * mean + (1 - smoothing) * value;
    weight = smoothing * weight + (1 - smoothing);
    return mean / weight;
  });
}

function nearest(sorted, value) {
  let low = 0, high = sorted.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < value) low = middle + 1;
    else high = middle;
  }
  return low > 0 && value - sorted[low - 1] < sorted[low] - value ? low - 1 : low;
}

// What the cursor is at: tokens, and each run's step and stage.
function place(tokens) {
  const parts = [`${Math.round(tokens).toLocaleString("en")} tokens`];
  for (const run of page.runs) {
    if (tokens > run.tokens[run.tokens.length - 1]) continue;
    const at = nearest(run.tokens, tokens);
    const name = page.runs.length > 1 ? `${run.name}: ` : "";
    const stage = run.names.length > 1 ? `, stage ${run.stages[at]} (${run.names[run.stages[at] - 1]})` : "";
    parts.push(`${name}step ${run.steps[at].toLocaleString("en")}${stage}`);
  }
  return parts.join(" · ");
}

function series(figure) {
  const drawn = [];
  for (const curve of figure.curves) {
    const stroke = color(`--c${curve.color}`);
    const form = forms[figure.form];
    const notes = curve.steps && new Map(curve.x.map((x, index) => [
      x, (curve.errors ? ` ± ${form(curve.errors[index])}` : "") + ` (step ${curve.steps[index].toLocaleString("en")})`,
    ]));
    const style = {
      label: curve.label, stroke, spanGaps: true, width: curve.steps ? 1 : 1.6, dash: page.dashes[curve.color],
      points: { show: Boolean(curve.steps), size: 7, fill: stroke, stroke: color("--panel") },
      value: (plot, value, number, index) =>
        value == null ? "–" : form(value) + (notes ? notes.get(plot.data[0][index]) : ""),
    };
    if (figure.stacked) {
      style.dash = [];
      style.fill = stroke;
      style.paths = uPlot.paths.stepped({ align: -1 });
      style.points.show = false;
      style.value = (plot, value, number, index) => value == null ? "–" : form(curve.shares[index]);
      drawn.push({ style, x: curve.x, y: curve.y });
    } else if (smoothing && !curve.steps) {
      drawn.push({ style: { ...style, alpha: 0.25, class: "raw" }, x: curve.x, y: curve.y });
      drawn.push({ style, x: curve.x, y: smoothed(curve.y) });
    } else drawn.push({ style, x: curve.x, y: curve.y });
  }
  return drawn;
}

function shade(plot, figure) {
  const { ctx } = plot, { left, top, width, height } = plot.bbox;
  ctx.save();
  ctx.beginPath();
  ctx.rect(left, 0, width, top + height);
  ctx.clip();
  ctx.font = `${11 * devicePixelRatio}px system-ui, sans-serif`;
  ctx.textAlign = "center";
  for (const [first, last, number, name] of figure.bands) {
    const from = plot.valToPos(first, "x", true), to = plot.valToPos(last, "x", true);
    if (number % 2 && !figure.stacked) {
      ctx.fillStyle = color("--shade");
      ctx.fillRect(from, top, to - from, height);
    }
    const seen = [Math.max(from, left), Math.min(to, left + width)];
    const text = [name, String(number)].find(one => ctx.measureText(one).width < seen[1] - seen[0] - 6);
    ctx.fillStyle = color("--text");
    if (text) ctx.fillText(text, (seen[0] + seen[1]) / 2, top - 5 * devicePixelRatio);
  }
  ctx.restore();
}

// The stages' targets, on a chart of shares.
function targets(plot, figure) {
  const { ctx } = plot, { left, top, width, height } = plot.bbox;
  ctx.save();
  ctx.beginPath();
  ctx.rect(left, top, width, height);
  ctx.clip();
  ctx.strokeStyle = color("--text");
  ctx.setLineDash([5 * devicePixelRatio, 4 * devicePixelRatio]);
  for (const [first, last, share] of figure.targets) {
    ctx.beginPath();
    ctx.moveTo(plot.valToPos(first, "x", true), plot.valToPos(share, "y", true));
    ctx.lineTo(plot.valToPos(last, "x", true), plot.valToPos(share, "y", true));
    ctx.stroke();
  }
  ctx.restore();
}

function bounds(figure, log, low, high) {
  if (low == null) return [0, 1];
  if (figure.stacked) return [0, 1];
  if (figure.curves.every(curve => curve.steps)) {
    // Few points: lines to those outside of the zoom stay in view.
    const values = figure.curves.flatMap(curve => curve.y);
    low = Math.min(...values);
    high = Math.max(...values);
  }
  if (log) return [low / Math.max((high / low) ** 0.04, 1.02), high * Math.max((high / low) ** 0.04, 1.02)];
  if (figure.zero) return [0, 1.06 * high || 1];
  const air = 0.05 * (high - low) || 0.05 * Math.abs(high) || 1;
  return [low - air, high + air];
}

function zoom(chosen) {
  range = chosen;
  for (const chart of charts) chart.plot.setScale("x", { min: range ? range[0] : 0, max: range ? range[1] : chart.figure.last });
  document.getElementById("reset").hidden = range === null;
}

// uPlot listens to the mouse only. A finger moves the cursor, and a horizontal drag zooms.
function fingers(plot) {
  plot.over.style.touchAction = "pan-y";
  for (const [touch, mouse] of [["touchstart", "mousedown"], ["touchmove", "mousemove"], ["touchend", "mouseup"]])
    plot.over.addEventListener(touch, event => {
      const { clientX, clientY } = event.changedTouches[0];
      const same = { clientX, clientY, bubbles: true, button: 0, movementX: 1 }; // uPlot ignores moves by nothing
      if (touch === "touchstart") plot.over.dispatchEvent(new MouseEvent("mousemove", same));
      plot.over.dispatchEvent(new MouseEvent(mouse, same));
    }, { passive: true });
}

function draw(chart) {
  const { figure, node, log } = chart;
  const drawn = series(figure).map(one => {
    if (!log) return one;
    const kept = one.y.map((y, index) => index).filter(index => one.y[index] > 0);
    return { style: one.style, x: kept.map(index => one.x[index]), y: kept.map(index => one.y[index]) };
  });
  const soft = color("--soft"), grid = { stroke: color("--rule"), width: 0.7 }, font = "11px system-ui, sans-serif";
  const options = {
    width: node.clientWidth, height: figure.wide ? 340 : 250, padding: [20, 20, 0, 0],
    scales: {
      x: { time: false, min: range ? range[0] : 0, max: range ? range[1] : figure.last },
      y: { distr: log ? 3 : 1, range: (plot, low, high) => bounds(figure, log, low, high) },
    },
    axes: [
      { stroke: soft, grid: { show: false }, ticks: grid, font, size: 34, space: 70,
        values: (plot, splits) => splits.map(short) },
      { stroke: soft, grid, ticks: { show: false }, font, size: 58,
        values: (plot, splits) => splits.map(value => value == null ? "" : (figure.form === "percent" ? forms.percent : short)(value)) },
    ],
    cursor: {
      sync: { key: "tokens", setSeries: false, filters: { pub: type => type === "mousemove" || type === "mouseleave" } },
      drag: { setScale: false }, hover: { skip: [null, undefined] }, bind: { dblclick: () => () => zoom(null) },
    },
    legend: { markers: { width: 3 } },
    series: [{ label: "", value: (plot, value) => value == null ? "" : place(value) }, ...drawn.map(one => one.style)],
    hooks: {
      drawClear: [plot => shade(plot, figure)],
      draw: [plot => targets(plot, figure)],
      setSelect: [plot => {
        if (plot.select.width < 5) return;
        zoom([plot.posToVal(plot.select.left, "x"), plot.posToVal(plot.select.left + plot.select.width, "x")]);
        plot.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
      }],
    },
  };
  chart.plot?.destroy();
  chart.plot = new uPlot(options, uPlot.join(drawn.map(one => [one.x, one.y])), node);
  fingers(chart.plot);
}

const redraw = () => charts.forEach(draw);

for (const node of document.querySelectorAll(".chart")) {
  const figure = page.figures[node.dataset.figure];
  const chart = { figure, node, log: figure.log === true };
  charts.push(chart);
  const button = node.parentElement.querySelector("button");
  if (button)
    button.onclick = () => {
      chart.log = !chart.log;
      button.textContent = chart.log ? "linear" : "log";
      draw(chart);
    };
  draw(chart);
  let width = node.clientWidth;
  new ResizeObserver(() => {
    if (node.clientWidth === width) return;
    width = node.clientWidth;
    chart.plot.setSize({ width, height: chart.plot.height });
  }).observe(node);
}
document.getElementById("smoothing").oninput = event => {
  smoothing = Number(event.target.value);
  redraw();
};
document.getElementById("reset").onclick = () => zoom(null);
matchMedia("(prefers-color-scheme: dark)").onchange = redraw;
