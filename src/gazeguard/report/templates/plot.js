// Axes and scales of the charts: plain SVG at the real width, so that text keeps its size on a narrow screen.

// Round numbers within [low, high], about `wanted` of them.
function niceTicks(low, high, wanted) {
  const rough = (high - low) / Math.max(1, wanted);
  if (!(rough > 0)) return [low];
  const power = 10 ** Math.floor(Math.log10(rough));
  const distance = (s) => Math.abs(Math.log(s / rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).sort((a, b) => distance(a) - distance(b))[0];
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i += 1) {
    ticks.push(i * step || 0); // never -0
  }
  return ticks;
}

function tickText(value, ticks) {
  const step = ticks.length > 1 ? Math.abs(ticks[1] - ticks[0]) : Math.abs(value) || 1;
  let digits = 0; // as many as the step needs: ticks 2.5 apart must not read 3, 5, 8
  while (digits < 6 && Math.abs(Math.round(step * 10 ** digits) / 10 ** digits - step) > 1e-6 * step) digits += 1;
  return value.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits }).replace("-", "−");
}

// A label broken into lines of at most `room` pixels.
function wrap(text, room) {
  const lines = [""];
  for (const word of text.split(" ")) {
    const longer = `${lines.at(-1)} ${word}`.trim();
    if (longer.length * 6.6 > room && lines.at(-1)) lines.push(word);
    else lines[lines.length - 1] = longer;
  }
  return lines;
}

// An empty plot with axes, grid lines and labels; returns the scales.
function plot(host, width, { height, x, y, xTicks, yTicks, xLabel, yLabel, xText, yText }) {
  const widest = Math.max(...yTicks.map((t) => yText(t).length));
  const left = 30 + 7 * widest;
  const below = wrap(xLabel, width - left - 14);
  const box = { left, right: 14, top: 12, bottom: 34 + 16 * below.length };
  const inner = { width: width - box.left - box.right, height: height - box.top - box.bottom };
  const svg = makeSvg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": host.dataset.alt });
  const sx = (v) => box.left + ((v - x[0]) / (x[1] - x[0] || 1)) * inner.width;
  const sy = (v) => box.top + inner.height - ((v - y[0]) / (y[1] - y[0] || 1)) * inner.height;
  const floor = box.top + inner.height;
  for (const tick of yTicks) {
    svg.append(makeSvg("line", { class: "grid", x1: box.left, x2: width - box.right, y1: sy(tick), y2: sy(tick) }));
    svg.append(makeSvg("text", { class: "tick", x: box.left - 8, y: sy(tick) + 4, "text-anchor": "end" }, yText(tick)));
  }
  for (const tick of xTicks) {
    svg.append(makeSvg("line", { class: "axis", x1: sx(tick), x2: sx(tick), y1: floor, y2: floor + 4 }));
    svg.append(makeSvg("text", { class: "tick", x: sx(tick), y: floor + 18, "text-anchor": "middle" }, xText(tick)));
  }
  svg.append(makeSvg("line", { class: "axis", x1: box.left, x2: width - box.right, y1: floor, y2: floor }));
  below.forEach((line, i) => {
    const y = height - 8 - 16 * (below.length - 1 - i);
    svg.append(makeSvg("text", { class: "label", x: box.left + inner.width / 2, y, "text-anchor": "middle" }, line));
  });
  const middle = box.top + inner.height / 2;
  svg.append(makeSvg("text", { class: "label", x: 13, y: middle, "text-anchor": "middle", transform: `rotate(-90 13 ${middle})` }, yLabel));
  host.replaceChildren(svg);
  return { svg, sx, sy, floor, box, inner };
}

// The two buttons that choose a linear or a logarithmic scale of `host`'s heights.
function startScale(host, draw, logarithmic) {
  const buttons = { false: byId("scale-linear"), true: byId("scale-log") };
  const redraw = drawToWidth(host, (width) => draw(host, width, logarithmic));
  const choose = (value) => {
    logarithmic = value;
    buttons.false.setAttribute("aria-pressed", `${!value}`);
    buttons.true.setAttribute("aria-pressed", `${value}`);
    redraw();
  };
  buttons.false.addEventListener("click", () => choose(false));
  buttons.true.addEventListener("click", () => choose(true));
  choose(logarithmic);
}
