// Draws a heat map over a photo. The map has a few cells (5 x 5, say), each placed where the network placed it: `box` is
// the whole map's place and `seen` that of the part of the photo that the network got, both as fractions of the photo.

const LONG_EDGE_PX = 720;
const GRID = 72; // the map is interpolated to so many points a side, and from there by the browser
const OPACITY = 0.62;

// Dark violet, magenta, orange, pale yellow: lightness grows evenly, so that it reads without colour vision too.
const STOPS = [
  [18, 10, 48],
  [106, 23, 110],
  [203, 66, 73],
  [249, 151, 40],
  [252, 247, 170],
];

export function drawHeat(canvas, map, aspect) {
  canvas.width = Math.max(1, Math.round(aspect >= 1 ? LONG_EDGE_PX : LONG_EDGE_PX * aspect));
  canvas.height = Math.max(1, Math.round(aspect >= 1 ? LONG_EDGE_PX / aspect : LONG_EDGE_PX));
  const context = canvas.getContext("2d");
  const { left, top, right, bottom } = map.seen;
  const [x, y] = [left * canvas.width, top * canvas.height];
  const [width, height] = [(right - left) * canvas.width, (bottom - top) * canvas.height];
  context.fillStyle = "rgb(8 8 16 / 0.72)";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.clearRect(x, y, width, height);
  context.imageSmoothingQuality = "high";
  context.drawImage(paint(map), x, y, width, height);
}

export function drawScale(canvas) {
  const context = canvas.getContext("2d");
  for (let x = 0; x < canvas.width; x++) {
    const [red, green, blue] = colour(x / (canvas.width - 1));
    context.fillStyle = `rgb(${red} ${green} ${blue})`;
    context.fillRect(x, 0, 1, canvas.height);
  }
}

// What speaks against the class counts as nothing; the strongest evidence for it has the brightest colour.
function paint({ values, box, seen }) {
  const largest = Math.max(...values.flat());
  const small = document.createElement("canvas");
  small.width = small.height = GRID;
  const context = small.getContext("2d");
  const image = context.createImageData(GRID, GRID);
  for (let row = 0; row < GRID; row++) {
    for (let column = 0; column < GRID; column++) {
      const u = seen.left + ((column + 0.5) / GRID) * (seen.right - seen.left);
      const v = seen.top + ((row + 0.5) / GRID) * (seen.bottom - seen.top);
      const value = at(values, (v - box.top) / (box.bottom - box.top), (u - box.left) / (box.right - box.left));
      const [red, green, blue] = colour(largest > 0 ? Math.min(1, Math.max(0, value / largest)) : 0);
      image.data.set([red, green, blue, 255 * OPACITY], 4 * (row * GRID + column));
    }
  }
  context.putImageData(image, 0, 0);
  return small;
}

// The map's value at a place (0 to 1 down, 0 to 1 across), by cubic interpolation between the centres of its cells.
function at(values, down, across) {
  const rows = values.length;
  const columns = values[0].length;
  const [row, rowWeights] = cubic(down * rows - 0.5);
  const [column, columnWeights] = cubic(across * columns - 0.5);
  let sum = 0;
  rowWeights.forEach((rowWeight, i) => {
    const line = values[clamp(row - 1 + i, rows)];
    columnWeights.forEach((weight, j) => (sum += rowWeight * weight * line[clamp(column - 1 + j, columns)]));
  });
  return sum;
}

function clamp(index, count) {
  return Math.min(count - 1, Math.max(0, index));
}

// Catmull and Rom's weights of the four cells around a place: at a cell's centre, that cell's value comes out.
function cubic(place) {
  const first = Math.floor(place);
  const t = place - first;
  return [
    first,
    [
      ((2 - t) * t - 1) * t * 0.5,
      ((3 * t - 5) * t * t + 2) * 0.5,
      ((4 - 3 * t) * t + 1) * t * 0.5,
      (t - 1) * t * t * 0.5,
    ],
  ];
}

function colour(value) {
  const place = value * (STOPS.length - 1);
  const first = Math.min(STOPS.length - 2, Math.floor(place));
  return STOPS[first].map((level, i) => Math.round(level + (place - first) * (STOPS[first + 1][i] - level)));
}
