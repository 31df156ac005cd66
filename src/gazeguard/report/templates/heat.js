// Attention drawn over each picture, one cell of the image grid as one pixel of a stretched canvas.

// Clear where the model does not look, then red, orange, yellow.
const RAMP = [[90, 10, 110], [190, 25, 90], [240, 85, 35], [255, 170, 20], [255, 240, 120]];

function heatColour(value) {
  const place = Math.min(value * (RAMP.length - 1), RAMP.length - 1.0001);
  const i = Math.floor(place);
  const mixed = RAMP[i].map((c, k) => Math.round(c + (place - i) * (RAMP[i + 1][k] - c)));
  return [...mixed, Math.round(255 * (0.1 + 0.76 * value))];
}

// `strongest` is shared by all pictures, so that an even spread looks even beside a hot spot.
function paintHeat(canvas, heat, strongest) {
  const cells = Uint8Array.from(atob(heat.data), (c) => c.charCodeAt(0));
  canvas.width = heat.w;
  canvas.height = heat.h;
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(heat.w, heat.h);
  cells.forEach((cell, i) => {
    const value = (((cell / 255) * heat.top) / strongest) ** 0.75;
    pixels.data.set(heatColour(Math.min(1, value)), 4 * i);
  });
  context.putImageData(pixels, 0, 0);
}

function placeName(heat) {
  const across = heat.x < 0.36 ? "left" : heat.x > 0.64 ? "right" : "";
  const down = heat.y < 0.36 ? "top" : heat.y > 0.64 ? "bottom" : "";
  return [down, across].filter(Boolean).join(" ") || "middle";
}

function startHeat() {
  const select = byId("heat-layer");
  const cards = [...document.querySelectorAll("[data-heat-row]")].map((card) => {
    const maps = DATA.heat[card.dataset.heatRow] ?? {};
    const note = card.querySelector(".heat-note");
    if (!Object.keys(maps).length) {
      note.textContent = select ? "No attention map was kept for this row." : "";
      return null;
    }
    const canvas = make("canvas", { role: "img" });
    const picture = card.querySelector("img").cloneNode();
    picture.alt = "";
    const figure = make("figure", { class: "view overlay" }, picture, canvas);
    card.querySelector(".views").append(figure);
    return { maps, note, canvas };
  });
  if (!select) return;
  const update = () => {
    const tops = cards.filter(Boolean).map((card) => card.maps[select.value]?.top ?? 0);
    const strongest = Math.max(...tops);
    for (const card of cards.filter(Boolean)) {
      const heat = card.maps[select.value];
      card.canvas.hidden = !heat;
      if (!heat) {
        card.note.textContent = `No attention map of layer ${select.value}.`;
        continue;
      }
      paintHeat(card.canvas, heat, strongest);
      const percent = (100 * heat.peak).toFixed(heat.peak < 0.1 ? 1 : 0);
      const text = `Strongest patch: ${percent} % of the attention, ${placeName(heat)}`;
      card.note.textContent = text;
      card.canvas.setAttribute("aria-label", `Attention of layer ${select.value}. ${text}.`);
    }
  };
  select.addEventListener("change", update);
  update();
}
startHeat();
