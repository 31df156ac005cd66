// Shared by the parts below; a page's files run as one script.
const DATA = JSON.parse(document.getElementById("report-data").textContent);
const whole = new Intl.NumberFormat("en-US");
const byId = (id) => document.getElementById(id);

// Builds an element; text always goes in as text, never as markup.
function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function makeSvg(tag, attributes = {}, text = null) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== null) node.textContent = text;
  return node;
}

// Draws now and whenever the width of `host` changes.
function drawToWidth(host, draw) {
  let drawn = 0;
  const update = () => {
    const width = Math.floor(host.clientWidth);
    if (width > 0 && width !== drawn) {
      drawn = width;
      draw(width);
    }
  };
  new ResizeObserver(update).observe(host);
  update();
  return () => {
    drawn = 0;
    update();
  };
}
