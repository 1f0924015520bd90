// Sends the chosen, dropped or pasted picture to /predict and draws the answer.
const $ = (id) => document.getElementById(id);
const form = $("form"), button = form.querySelector("button");
const PATIENCE_MILLISECONDS = 30_000;
let running = null;  // aborts the newest picture's request

function bar(label, probability) {
  const item = document.createElement("li");
  const name = document.createElement("span"), track = document.createElement("span"), share = document.createElement("span");
  const fill = document.createElement("i");
  track.className = "track";
  track.ariaHidden = "true";
  fill.style.width = `${100 * probability}%`;
  track.append(fill);
  name.textContent = label;
  share.textContent = `${(100 * probability).toFixed(1)} %`;
  item.append(name, track, share);
  return item;
}

function familiarity({ familiarity: share, unfamiliar }) {
  if (share === null) return "";
  if (unfamiliar) return "Not much like the pictures it was trained on: it may well show something else.";
  return `More familiar than ${Math.floor(100 * share)} % of the pictures held out of its training.`;
}

function showAnswer(answer, picture) {
  URL.revokeObjectURL($("preview").src);
  $("preview").src = URL.createObjectURL(picture);
  $("verdict").textContent = `${answer.label}, ${(100 * answer.confidence).toFixed(1)} %`;
  // For unfamiliar pictures the set guarantees nothing.
  const all = answer.prediction_set?.length === Object.keys(answer.probabilities).length;  // nor does a set of all classes
  const likely = answer.unfamiliar || all ? null : answer.prediction_set;
  $("set").textContent = likely ? `Likely ${likely.join(" or ")}: for pictures like those it was trained on, such answers include the right class about 95 times in 100.` : "";
  $("familiarity").textContent = familiarity(answer);
  $("familiarity").classList.toggle("warning", answer.unfamiliar === true);
  $("bars").replaceChildren(...Object.entries(answer.probabilities).map(([label, p]) => bar(label, p)));
  $("answer").hidden = false;
  $("verdict").scrollIntoView({ block: "nearest" });  // it is below the fold of a phone
  // Read out in short, without the bars, one for each class.
  $("status").textContent = [$("verdict"), $("set"), $("familiarity")].map((part) => part.textContent).join(" ");
}

function showError({ error, detail }, status) {
  const sized = detail?.expected && `The picture is ${detail.width} × ${detail.height}. Choose above what to do with it.`;
  $("error").textContent = sized || (typeof error === "string" && error) || `Something between this page and the service answered with ${status}.`;
  $("error").hidden = false;
  $("error").scrollIntoView({ block: "nearest" });
}

// The answer shown must match the form, so clear it whenever the form changes.
function clear() {
  running?.abort();
  running = null;
  $("answer").hidden = $("error").hidden = true;
  button.ariaDisabled = "false";  // not `disabled`, which would take its focus
  button.textContent = "Classify";
  $("status").textContent = "";
}

async function classify(picture) {
  clear();
  const own = running = new AbortController();
  button.ariaDisabled = "true";
  button.textContent = $("status").textContent = "Classifying…";
  const body = new FormData();
  body.append("file", picture);
  const resize = $("resize").value;
  const timer = setTimeout(() => own.abort(), PATIENCE_MILLISECONDS);
  let show;
  try {
    const response = await fetch("predict" + (resize && `?resize=${resize}`), { method: "POST", body, signal: own.signal });
    const text = await response.text();
    let answer = {};
    try {
      answer = JSON.parse(text) ?? {};
    } catch {}  // not the service's answer
    show = () => (response.ok && answer.probabilities ? showAnswer(answer, picture) : showError(answer, response.status));
  } catch {
    show = () => showError({ error: "No answer. Is the service still running, and the file still there?" });
  }
  clearTimeout(timer);
  if (own !== running) return;  // another picture has been chosen meanwhile
  clear();
  show();
}

function take(files) {
  if (files.length === 0) return;
  const first = new DataTransfer();
  first.items.add(files[0]);
  $("file").files = first.files;
  classify(files[0]);
}

async function introduce() {
  const response = await fetch("metrics/per-class");
  if (!response.ok) return;  // these weights carry no figures
  const { classes } = await response.json();
  const labels = classes.map(({ label }) => label);
  $("classes").textContent = `It knows ${labels.slice(0, -1).join(", ")} and ${labels.at(-1)}, and takes anything else for one of these.`;
}

introduce().catch(() => {});  // the first picture will say that nobody answers
form.addEventListener("change", clear);
form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (!running) classify($("file").files[0]);
});
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dropping");
});
document.addEventListener("dragleave", () => document.body.classList.remove("dropping"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  if (event.dataTransfer.files.length) return take(event.dataTransfer.files);
  clear();  // a picture from another page comes as its address
  showError({ error: "What was dropped is not a file. Save the picture, then choose or drop its file." });
});
document.addEventListener("paste", (event) => take(event.clipboardData.files));
