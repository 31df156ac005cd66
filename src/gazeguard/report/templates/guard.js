// The scores and the requests of a guarded run.

function scoreText(value) {
  return value === null ? "–" : value.toLocaleString("en-US", { minimumFractionDigits: 2, maximumFractionDigits: 2 });
}

// The smallest p that so many calibration inputs allow says no more than "at most".
function pText(p) {
  const least = 1 / (DATA.inputs.calibration + 1);
  return `${p < 1.001 * least ? "≤ " : ""}${Number(p.toPrecision(2))}`;
}

// 1, 2 and 5 times every power of ten, thinned out to powers where they are many.
function decadeTicks(low, high) {
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); 10 ** power <= high; power += 1) {
    for (const m of [1, 2, 5]) ticks.push(m * 10 ** power);
  }
  const inside = ticks.filter((t) => t >= low && t <= high);
  return inside.length > 9 ? inside.filter((t) => Math.log10(t) % 1 === 0) : inside;
}

function drawScores(host, width, logarithmic) {
  const { log, edges, calibration, clean, flagged } = DATA.bins;
  const onAxis = log ? Math.log10 : (v) => v;
  const ends = [onAxis(edges[0]), onAxis(edges.at(-1))];
  // Two sets of unlike size share the axis, so heights are shares of each set.
  const share = (n, set) => n / Math.max(1, DATA.inputs[set]);
  const groups = DATA.points ? [] : [["kept", clean, "clean"], ["flagged", flagged, "flagged"]];
  const heights = calibration.map((n) => share(n, "calibration")).concat(...groups.map(([, counts]) => counts.map((n) => share(n, "requests"))));
  const top = Math.max(...heights) * 1.14; // room for the threshold's name
  const least = 0.5 * Math.min(...heights.filter((h) => h > 0));
  const lift = logarithmic ? (v) => Math.log10(Math.max(v, least)) : (v) => v;
  const yTicks = [];
  if (logarithmic) for (let t = 10 ** Math.ceil(Math.log10(least)); t <= top; t *= 10) yTicks.push(Math.log10(t));
  else yTicks.push(...niceTicks(0, top, 4));
  const percents = yTicks.map((t) => 100 * (logarithmic ? 10 ** t : t));
  const xTicks = log ? decadeTicks(edges[0], edges.at(-1)) : niceTicks(...ends, Math.max(4, Math.floor(width / 90)));
  const { svg, sx, sy, floor, box } = plot(host, width, {
    height: 320, x: ends, y: logarithmic ? [lift(least), lift(top * 1.3)] : [0, top], yTicks,
    xTicks: xTicks.map(onAxis),
    xLabel: `score: distance from clean inputs${log ? " (log scale)" : ""}`,
    yLabel: logarithmic ? "share of each set (log)" : "share of each set",
    xText: (v) => (log ? `${Number((10 ** v).toPrecision(3))}` : tickText(v, xTicks)),
    yText: (v) => `${logarithmic ? Number((100 * 10 ** v).toPrecision(2)) : tickText(100 * v, percents)} %`,
  });
  const place = (edge) => sx(onAxis(edge));
  const between = (i) => `${scoreText(edges[i])} to ${scoreText(edges[i + 1])}`;
  for (const [kind, counts, word] of groups) {
    counts.forEach((n, i) => {
      if (!n) return;
      const [left, right] = [place(edges[i]), place(edges[i + 1])];
      const gap = Math.min(1, 0.12 * (right - left));
      const y = sy(lift(share(n, "requests")));
      const bar = makeSvg("rect", { class: `bar ${kind}`, x: left + gap / 2, width: right - left - gap, y, height: Math.max(1, floor - y) });
      bar.append(makeSvg("title", {}, `${between(i)}: ${whole.format(n)} ${word}`));
      svg.append(bar);
    });
  }
  // The calibration as an outline, so that the bars behind it can be compared with it.
  let path = `M${place(edges[0]).toFixed(1)} ${floor}`;
  calibration.forEach((n, i) => {
    const y = n ? sy(lift(share(n, "calibration"))) : floor;
    path += `V${y.toFixed(1)}H${place(edges[i + 1]).toFixed(1)}`;
  });
  svg.append(makeSvg("path", { class: "outline", d: `${path}V${floor}` }));
  for (const score of DATA.points ?? []) {
    const held = Math.min(Math.max(score, edges[0]), edges.at(-1));
    const kind = score > DATA.threshold ? "flagged" : "kept";
    const mark = makeSvg("line", { class: `point ${kind}`, x1: place(held), x2: place(held), y1: floor - 18, y2: floor });
    mark.append(makeSvg("title", {}, `request with score ${scoreText(score)}`));
    svg.append(mark);
  }
  const limit = place(DATA.threshold);
  svg.append(makeSvg("line", { class: "threshold", x1: limit, x2: limit, y1: box.top, y2: floor }));
  const right = limit + 120 < width;
  svg.append(makeSvg("text", { class: "limit", x: limit + (right ? 6 : -6), y: box.top + 10, "text-anchor": right ? "start" : "end" }, `threshold ${scoreText(DATA.threshold)}`));
}

function requestRow(row) {
  return tableRow(
    row,
    make("td", { role: "cell", class: `c-outcome ${row.outcome}`, title: row.reason }, row.outcome),
    make("td", { role: "cell", class: "c-score" }, scoreText(row.score)),
    make("td", { role: "cell", class: "c-p" }, row.p === null ? "–" : pText(row.p)),
  );
}

function startGuard() {
  const host = byId("scores");
  if (host) {
    const highest = Math.max(...DATA.bins.flagged);
    // On a linear scale a group under 3 % of the tallest bar is a flat line.
    startScale(host, drawScores, !DATA.points && highest > 0 && highest < 0.03 * Math.max(...DATA.bins.clean));
  }
  startTable(requestRow, "score");
}
startGuard();
