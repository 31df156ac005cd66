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
  const drawn = [...document.querySelectorAll("[data-heat-row]")].flatMap((card) => {
    const notes = card.querySelectorAll(".heat-note");
    return [...card.querySelectorAll(".views")].map((views, i) => {
      const maps = DATA.heat[card.dataset.heatRow]?.[i] ?? {};
      const note = notes[i];
      const name = notes.length > 1 ? `Image ${i + 1}. ` : "";
      if (!Object.keys(maps).length) {
        note.textContent = select ? `${name}No attention map was kept.` : "";
        return null;
      }
      const canvas = make("canvas", { role: "img" });
      const picture = views.querySelector("img").cloneNode();
      picture.alt = "";
      views.append(make("figure", { class: "view overlay" }, picture, canvas));
      return { maps, note, name, canvas };
    });
  }).filter(Boolean);
  if (!select) return;
  const update = () => {
    const strongest = Math.max(...drawn.map(({ maps }) => maps[select.value]?.top ?? 0));
    for (const { maps, note, name, canvas } of drawn) {
      const heat = maps[select.value];
      canvas.hidden = !heat;
      if (!heat) {
        note.textContent = `${name}No attention map of layer ${select.value}.`;
        continue;
      }
      paintHeat(canvas, heat, strongest);
      const percent = (100 * heat.peak).toFixed(heat.peak < 0.1 ? 1 : 0);
      const text = `${name}Strongest patch: ${percent} % of the attention, ${placeName(heat)}`;
      note.textContent = text;
      canvas.setAttribute("aria-label", `Attention of layer ${select.value}. ${text}.`);
    }
  };
  select.addEventListener("change", update);
  update();
}
startHeat();
