// The page: photos in by drop, paste, file, camera or sample; the server's answer out.

import { setUpCamera } from "./camera.js";
import { drawHeat, drawScale } from "./heat.js";

const SHOWN_CLASSES = 5;
const MAX_FILE_BYTES = 100_000_000; // no server takes more; its own limit may be lower, and its answer says so
const RETRY_MS = 1000;
const WORTH_RETRYING = new Set([408, 429, 500, 502, 503, 504]);

const $ = (id) => document.getElementById(id);
const percent = new Intl.NumberFormat("en", { style: "percent", maximumFractionDigits: 0 });

let current = null; // the photo on show: {bytes, name, row, maps by class, chosen class}
let models = []; // as /v1/models gives them
let asking = new AbortController(); // ends the request in work when another takes its place
let showsHeat = false;

const modelsAreKnown = loadModels();

async function loadModels() {
  for (;;) {
    try {
      const response = await fetch("v1/models");
      if (response.ok) {
        models = await response.json();
        fillPicker();
        return;
      }
      $("status").textContent = "The model is being loaded.";
    } catch {
      $("model").options[0].textContent = "no answer yet";
    }
    await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
  }
}

function fillPicker() {
  $("model").replaceChildren(...models.map(({ name }) => new Option(name, name)));
  $("model").disabled = false;
}

function chosenModel() {
  return models.find(({ name }) => name === $("model").value);
}

// --- A photo comes in ---------------------------------------------------------------------------------------------

async function take(file, name) {
  hideProblem();
  if (file.size > MAX_FILE_BYTES) {
    refuse(name, "A photo must be at most 100 MB as a file. Save it smaller.");
    return;
  }
  let bytes;
  try {
    bytes = new Blob([await file.arrayBuffer()], { type: file.type });
  } catch {
    refuse(name, "This cannot be read as a file. If it is a folder, choose one photo in it.");
    return;
  }
  current = { bytes, name, row: null, maps: new Map(), chosen: null };
  showPhoto();
  await classify();
}

function takeFirst(files) {
  const [file] = files;
  if (!file) {
    refuse("", "There is no photo in this. Drop or paste the photo's file itself.");
    return;
  }
  take(file, file.name);
}

function setUpIntake() {
  for (const id of ["file", "capture"]) {
    $(id).addEventListener("change", ({ target }) => {
      if (target.files.length) takeFirst(target.files);
      target.value = ""; // so that the same file can be chosen again
    });
  }
  $("pick").addEventListener("click", () => $("file").click());
  document.addEventListener("paste", ({ clipboardData }) => takeFirst(clipboardData.files));
  for (const button of document.querySelectorAll("[data-sample]")) {
    button.addEventListener("click", () => takeSample(button.dataset.sample));
  }
  setUpCamera(
    (blob) => take(blob, "the camera's photo"),
    (text) => refuse("", text),
  );
}

async function takeSample(name) {
  const response = await fetch(`page/samples/${name}`).catch(() => null);
  if (response?.ok) await take(await response.blob(), name);
  else sayNoAnswer(() => takeSample(name));
}

function setUpDrop() {
  const carriesFile = ({ dataTransfer }) => dataTransfer.types.includes("Files");
  const mark = (on) => document.body.classList.toggle("dragging", on);
  document.addEventListener("dragover", (event) => {
    event.preventDefault(); // a browser would leave the page and open the file
    mark(carriesFile(event));
  });
  document.addEventListener("dragleave", ({ relatedTarget }) => relatedTarget || mark(false));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    mark(false);
    takeFirst(event.dataTransfer.files);
  });
}

// --- The server is asked ------------------------------------------------------------------------------------------

async function classify() {
  const photo = current;
  asking.abort();
  asking = new AbortController();
  const { signal } = asking;
  $("answer").setAttribute("aria-busy", "true");
  $("status").textContent = models.length ? "Looking at the photo." : "The model is being loaded.";
  await modelsAreKnown;
  if (photo !== current || signal.aborted) return;
  photo.maps.clear();
  const begun = performance.now();
  const answer = await ask(photo.bytes, "true", signal, classify);
  if (!answer || photo !== current) return;
  Object.assign(photo, { row: answer, milliseconds: performance.now() - begun, chosen: answer.top[0].index });
  if (answer.heatmap) photo.maps.set(answer.heatmap.index, answer.heatmap);
  showAnswer();
}

// Returns the server's row; where there is none, says why and returns nothing.
async function ask(bytes, heatmap, signal, again) {
  const { name, heatmap: hasMaps } = chosenModel();
  const query = new URLSearchParams({ k: SHOWN_CLASSES, model: name, ...(hasMaps && { heatmap }) });
  const headers = { "Content-Type": "application/octet-stream" }; // the photo's own bytes say what it is
  try {
    const response = await fetch(`v1/classify?${query}`, { method: "POST", body: bytes, headers, signal });
    const row = await response.json().catch(() => ({}));
    if (response.ok) return row;
    const text = row.error ?? `The server answers with status ${response.status}.`;
    refuse(current.name, text, WORTH_RETRYING.has(response.status) ? again : null);
  } catch (error) {
    if (error.name !== "AbortError") sayNoAnswer(again);
  }
  return null;
}

// --- What is shown ------------------------------------------------------------------------------------------------

function showPhoto() {
  const image = $("photo");
  URL.revokeObjectURL(image.src);
  $("no-preview").hidden = true;
  $("heat").hidden = true;
  image.hidden = false;
  image.onerror = () => {
    image.hidden = true;
    $("no-preview").hidden = false;
  };
  image.onload = showHeat;
  image.src = URL.createObjectURL(current.bytes);
  image.alt = `Your photo: ${current.name}`;
}

function showAnswer() {
  const { row, milliseconds } = current;
  const [best] = row.top;
  document.body.classList.add("answered");
  $("result").hidden = false;
  $("result").scrollIntoView({ block: "nearest" }); // on a phone it begins below what is on show
  $("answer").removeAttribute("aria-busy");
  $("best").textContent = best.label;
  $("classes").replaceChildren(...row.top.map(classRow));
  $("timing").textContent = `Answered in ${Math.round(milliseconds)} ms, the way there and back included.`;
  const isUnknown = row.known === false;
  $("eyebrow").textContent = isUnknown ? "Nothing I know; nearest" : "Best guess";
  $("scope").textContent = scope(row.known);
  $("status").textContent =
    `${current.name}: ${isUnknown ? "nothing I know; nearest " : ""}${row.top.map((score) => `${score.label} ${share(score)}`).join(", ")}.`;
  showHeat();
}

// What the model knows, and what it says of a photo that shows none of it (`known` is left out where it cannot tell).
function scope(known) {
  const things = `${chosenModel().classes.toLocaleString("en")} things`;
  if (known === undefined) {
    return `This model knows ${things} and names the likeliest of them, even when the photo shows none.`;
  }
  return `This model knows ${things}${known ? "" : ", and this photo looks like none of them"}.`;
}

function classRow(score) {
  const hasMap = Boolean(chosenModel().heatmap);
  const row = document.createElement(hasMap ? "button" : "div");
  row.className = "class";
  row.append(piece("label", score.label), piece("share", share(score)), bar(score.probability));
  if (hasMap) {
    row.type = "button";
    row.dataset.index = score.index;
    row.addEventListener("click", () => chooseMap(score));
  }
  const item = document.createElement("li");
  item.append(row);
  return item;
}

function piece(name, text) {
  const element = document.createElement("span");
  element.className = name;
  element.textContent = text;
  return element;
}

function bar(probability) {
  const track = piece("bar", "");
  track.setAttribute("aria-hidden", "true");
  track.append(piece("fill", ""));
  track.firstChild.style.width = `${100 * probability}%`;
  return track;
}

function share({ probability }) {
  return probability < 0.01 ? "< 1%" : percent.format(probability);
}

// --- Where the model looked ---------------------------------------------------------------------------------------

async function chooseMap({ index, label }) {
  const photo = current;
  if (!photo.maps.has(index)) {
    const row = await ask(photo.bytes, index, asking.signal, () => chooseMap({ index, label }));
    if (!row || photo !== current) return;
    photo.maps.set(index, row.heatmap);
  }
  photo.chosen = index;
  showsHeat = true;
  $("result").hidden = false; // a request before may have failed
  showHeat();
  $("status").textContent = `The photo shows where the model looked for ${label}.`;
}

function showHeat() {
  const map = current?.row && current.maps.get(current.chosen);
  const image = $("photo");
  const drawn = Boolean(map && showsHeat && image.naturalWidth && !image.hidden);
  $("heat-controls").hidden = !map || image.hidden;
  $("heat-switch").checked = showsHeat;
  $("heat").hidden = $("legend").hidden = $("heat-note").hidden = !drawn;
  for (const row of $("classes").querySelectorAll("button")) {
    row.setAttribute("aria-pressed", String(drawn && Number(row.dataset.index) === current.chosen));
  }
  if (!drawn) return;
  drawHeat($("heat"), map, image.naturalWidth / image.naturalHeight);
  const { label } = current.row.top.find(({ index }) => index === current.chosen);
  const { left, top, right, bottom } = map.seen;
  const isCut = Math.max(left, top, 1 - right, 1 - bottom) > 0.01;
  $("heat").setAttribute("aria-label", `Where the model looked for ${label}`);
  $("heat-note").textContent =
    `Bright: what spoke for ${label}. Choose another name to see what spoke for that.` +
    (isCut ? " The model sees the middle square; the rest is dark." : "");
}

// --- When something is wrong --------------------------------------------------------------------------------------

function refuse(name, text, again = null) {
  if (!again) {
    current = null;
    asking.abort();
  }
  $("result").hidden = true;
  $("status").textContent = "";
  $("problem-title").textContent = again ? "That did not work just now" : name ? `${name} was not classified` : "No photo";
  $("problem-text").textContent = text.charAt(0).toUpperCase() + text.slice(1);
  $("retry").hidden = !again;
  $("retry").onclick = () => {
    hideProblem();
    again();
  };
  $("problem").hidden = false;
}

function sayNoAnswer(again) {
  refuse(
    "",
    "The server cannot be reached, or broke the upload off. See that it runs and that the file is no giant.",
    again,
  );
}

function hideProblem() {
  $("problem").hidden = true;
}

setUpIntake();
setUpDrop();
drawScale($("scale"));
$("model").addEventListener("change", () => current && classify());
$("heat-switch").addEventListener("change", ({ target }) => {
  showsHeat = target.checked;
  showHeat();
});
