// Charts of a cleaned data set.

function bell(part, x) {
  const z = (x - part.mean) / part.std;
  return Math.exp(-0.5 * z * z) / (part.std * Math.sqrt(2 * Math.PI));
}

function drawHistogram(host, width, logarithmic) {
  const { low, high, kept, flagged } = DATA.histogram;
  const bins = kept.length;
  const step = (high - low) / bins;
  const fits = DATA.curves;
  const curve = (part, x) => DATA.measured * step * part.weight * bell(part, x);
  // A very narrow component would dwarf the bars it describes: the bars set the scale.
  const tallest = Math.max(1, ...kept, ...flagged);
  const top = Math.min(1.6 * tallest, Math.max(tallest, ...fits.map((part) => curve(part, part.mean)))) * 1.04;
  const lift = logarithmic ? (v) => Math.log10(Math.max(v, 0.5)) : (v) => v;
  const y = logarithmic ? [lift(0.5), lift(top * 1.3)] : [0, top];
  const yTicks = [];
  if (logarithmic) for (let t = 1; t <= top * 1.3; t *= 10) yTicks.push(Math.log10(t));
  else yTicks.push(...niceTicks(0, top, 4).filter(Number.isInteger));
  const xTicks = niceTicks(low, high, Math.max(4, Math.floor(width / 90)));
  const { svg, sx, sy, floor, box, inner } = plot(host, width, {
    height: 300, x: [low, high], y, xTicks, yTicks,
    xLabel: DATA.scoreName,
    yLabel: logarithmic ? "rows per bin (log scale)" : "rows per bin",
    xText: (v) => tickText(v, xTicks),
    yText: (v) => whole.format(logarithmic ? Math.round(10 ** v) : v),
  });
  const room = inner.width / bins;
  const gap = Math.min(1, 0.12 * room);
  for (const [kind, counts, word] of [["kept", kept, "kept"], ["flagged", flagged, "removed"]]) {
    counts.forEach((rows, i) => {
      if (!rows) return;
      const from = low + i * step;
      const bar = makeSvg("rect", { class: `bar ${kind}`, x: sx(from) + gap / 2, width: room - gap, y: sy(lift(rows)), height: Math.max(1, floor - sy(lift(rows))) });
      const ends = [from, from + step].map((v) => v.toPrecision(4)).join(" to ");
      bar.append(makeSvg("title", {}, `${ends}: ${whole.format(rows)} ${word}`));
      svg.append(bar);
    });
  }
  if (DATA.cut !== null) {
    svg.append(makeSvg("line", { class: "threshold", x1: sx(DATA.cut), x2: sx(DATA.cut), y1: box.top, y2: floor }));
  }
  const points = Math.max(120, Math.floor(inner.width / 2));
  for (const part of fits) {
    let path = "";
    let open = false;
    for (let i = 0; i <= points; i += 1) {
      const x = low + ((high - low) * i) / points;
      const height = Math.max(box.top, sy(lift(curve(part, x))));
      // Tails that lie on the axis say nothing and hide the axis.
      const visible = height < floor - 0.75;
      if (visible) path += `${open ? "L" : "M"}${sx(x).toFixed(1)} ${height.toFixed(1)}`;
      open = visible;
    }
    svg.append(makeSvg("path", { class: `curve ${part.suspicious ? "flagged" : "kept"}`, d: path }));
  }
}

// Layer numbers under the axis, thinned out until they fit.
function layerTicks(layers, width) {
  const every = [1, 2, 4, 5, 8, 10, 20].find((n) => (layers.length / n) * 26 < width) ?? 50;
  return layers.map((row, i) => [row, i]).filter(([row]) => row.layer % every === 0).map(([, i]) => i);
}

function drawSeparation(host, width) {
  const layers = DATA.layers;
  const limit = DATA.bsiThreshold;
  if (!layers.some((row) => row.bsi > 0)) {
    host.replaceChildren(make("p", { class: "empty" }, "No separation was measured."));
    return;
  }
  const top = Math.max(limit ?? 0, ...layers.map((row) => row.bsi ?? 0), 0.5) * 1.12;
  const yTicks = niceTicks(0, top, 4);
  const { svg, sx, sy, floor, box } = plot(host, width, {
    height: 250, x: [-0.6, layers.length - 0.4], y: [0, top], yTicks,
    xTicks: layerTicks(layers, width - 60),
    xLabel: "decoder layer", yLabel: "separation (BSI)",
    xText: (i) => `${layers[i].layer}`, yText: (v) => tickText(v, yTicks),
  });
  const bar = Math.max(1.5, Math.min(44, (sx(1) - sx(0)) * 0.72));
  layers.forEach((row, i) => {
    const height = row.bsi === null ? 0 : Math.max(1, floor - sy(row.bsi));
    const rect = makeSvg("rect", { class: `bar ${row.selected ? "used" : "unused"}`, x: sx(i) - bar / 2, width: bar, y: floor - height, height });
    const value = row.bsi === null ? "not measured" : row.bsi.toFixed(2);
    rect.append(makeSvg("title", {}, `layer ${row.layer}: ${value}${row.selected ? ", used" : ""}`));
    svg.append(rect);
  });
  if (limit !== null) {
    svg.append(makeSvg("line", { class: "threshold", x1: box.left, x2: width - box.right, y1: sy(limit), y2: sy(limit) }));
  }
}

function drawEntropy(host, width) {
  const layers = DATA.layers;
  const lines = [["kept", "mean_entropy_kept"], ["flagged", "mean_entropy_flagged"]];
  const values = layers.flatMap((row) => [row.mean_entropy_kept, row.mean_entropy_flagged]).filter((v) => v !== null);
  if (!values.length) {
    host.replaceChildren(make("p", { class: "empty" }, "No entropy was measured."));
    return;
  }
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const room = Math.max(0.1, (high - low) * 0.12);
  const y = [Math.max(0, low - room), high + room];
  const yTicks = niceTicks(y[0], y[1], 4);
  const { svg, sx, sy } = plot(host, width, {
    height: 250, x: [-0.6, layers.length - 0.4], y, yTicks,
    xTicks: layerTicks(layers, width - 60),
    xLabel: "decoder layer", yLabel: "entropy (nats)",
    xText: (i) => `${layers[i].layer}`, yText: (v) => tickText(v, yTicks),
  });
  for (const [kind, field] of lines) {
    let path = "";
    let open = false;
    layers.forEach((row, i) => {
      const value = row[field];
      if (value !== null) path += `${open ? "L" : "M"}${sx(i).toFixed(1)} ${sy(value).toFixed(1)}`;
      open = value !== null;
    });
    svg.append(makeSvg("path", { class: `curve ${kind}`, d: path }));
    layers.forEach((row, i) => {
      if (row[field] === null) return;
      const dot = makeSvg("circle", { class: `dot ${kind}`, cx: sx(i), cy: sy(row[field]), r: layers.length > 40 ? 2 : 3.5 });
      dot.append(makeSvg("title", {}, `layer ${row.layer}, ${kind === "kept" ? "kept" : "removed"}: ${row[field].toFixed(3)} nats`));
      svg.append(dot);
    });
  }
}

function startCharts() {
  const host = byId("histogram");
  if (host) {
    const tallest = Math.max(...DATA.histogram.flagged);
    // On a linear scale a group under 3 % of the tallest bar is a flat line.
    startScale(host, drawHistogram, tallest > 0 && tallest < 0.03 * Math.max(...DATA.histogram.kept));
  }
  for (const [id, draw] of [["separation", drawSeparation], ["entropy", drawEntropy]]) {
    const chart = byId(id);
    if (chart) drawToWidth(chart, (width) => draw(chart, width));
  }
}
startCharts();
