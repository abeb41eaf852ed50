// Line plots in SVG, and numbers in words.

const NAMESPACE = "http://www.w3.org/2000/svg";
const LEFT = 54, RIGHT = 8, TOP = 8, BOTTOM = 18;
const MOST_POINTS = 400;

export function bytes(count) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (count >= 1000 && unit < units.length - 1) { count /= 1000; unit += 1; }
  return `${unit && count < 100 ? count.toPrecision(3) : Math.round(count)} ${units[unit]}`;
}

export function short(number) {
  if (number >= 1e6) return `${(number / 1e6).toPrecision(3)}M`;
  if (number >= 1e4) return `${(number / 1e3).toPrecision(3)}k`;
  return number >= 100 || Number.isInteger(number) ? Math.round(number).toString() : number.toPrecision(2);
}

// Keep the shape of a long series in a bounded number of points: every second one of the older half goes.
export function thin(points) {
  if (points.length <= MOST_POINTS) return points;
  const half = points.length >> 1;
  return points.filter((_, i) => i >= half || i % 2 === 0);
}

function add(parent, name, attributes, text) {
  const element = document.createElementNS(NAMESPACE, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  parent.append(element);
}

// lines: [{kind: "one" | "two", points: [[x, y], ...]}]; y begins at `bottom`.
export function plot(svg, lines, { word = short, unit = "", bottom = 0 } = {}) {
  const width = svg.clientWidth || 320, height = svg.clientHeight || 104;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.replaceChildren();
  const all = lines.flatMap((line) => line.points);
  const right = Math.max(1, ...all.map((point) => point[0])), left = Math.min(right - 1, ...all.map((point) => point[0]));
  const top = Math.max(bottom + 1e-9, ...all.map((point) => point[1])) * 1.08;
  const x = (value) => LEFT + ((value - left) / (right - left)) * (width - LEFT - RIGHT);
  const y = (value) => height - BOTTOM - ((value - bottom) / (top - bottom)) * (height - TOP - BOTTOM);
  add(svg, "line", { class: "axis", x1: LEFT, x2: width - RIGHT, y1: y(bottom), y2: y(bottom) });
  if (!all.length) return;
  add(svg, "text", { x: LEFT - 5, y: y(bottom), "text-anchor": "end" }, word(bottom));
  const highest = Math.max(...all.map((point) => point[1]));
  add(svg, "text", { x: LEFT - 5, y: y(highest) + 4, "text-anchor": "end" }, word(highest));
  add(svg, "text", { x: LEFT, y: height - 4 }, short(left));
  add(svg, "text", { x: width - RIGHT, y: height - 4, "text-anchor": "end" }, `${short(right)} ${unit}`);
  for (const line of lines) {
    const points = line.points.map(([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}`).join(" ");
    if (points) add(svg, "polyline", { class: line.kind, points });
  }
}
