// Sends the chosen or dropped picture to /predict and draws the answer.
const $ = (id) => document.getElementById(id);
const form = $("form"), button = form.querySelector("button");

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
  if (unfamiliar) return "Little like the pictures it was trained on: it may well show something else.";
  return `More familiar than ${(100 * share).toFixed(0)} % of the pictures it was tested with.`;
}

function showAnswer(answer, picture) {
  URL.revokeObjectURL($("preview").src);
  $("preview").src = URL.createObjectURL(picture);
  $("verdict").textContent = `${answer.label}, ${(100 * answer.confidence).toFixed(1)} %`;
  // Of other pictures than it was trained for, the set promises nothing.
  const all = answer.prediction_set?.length === Object.keys(answer.probabilities).length;  // says nothing either
  const likely = answer.unfamiliar || all ? null : answer.prediction_set;
  $("set").textContent = likely ? `Likely ${likely.join(" or ")}: of pictures like those it was trained on, such a list holds the right class 95 times in 100.` : "";
  $("familiarity").textContent = familiarity(answer);
  $("familiarity").classList.toggle("warning", answer.unfamiliar === true);
  $("bars").replaceChildren(...Object.entries(answer.probabilities).map(([label, p]) => bar(label, p)));
  $("answer").hidden = false;
}

function showError(sentence) {
  $("error").textContent = sentence;
  $("error").hidden = false;
  $("answer").hidden = true;
}

async function classify(picture) {
  if (button.ariaDisabled === "true") return;
  const body = new FormData();
  body.append("file", picture);
  const resize = $("resize").value;
  button.ariaDisabled = "true";  // not `disabled`, which would take the focus from it
  $("error").hidden = true;
  try {
    const response = await fetch("predict" + (resize && `?resize=${resize}`), { method: "POST", body });
    const answer = await response.json().catch(() => ({ error: `The answer was ${response.status} ${response.statusText}.` }));
    if (response.ok) showAnswer(answer, picture);
    else showError(answer.error);
  } catch {
    showError("The service did not answer. Is it still running?");
  } finally {
    button.ariaDisabled = "false";
  }
}

async function introduce() {
  const response = await fetch("metrics/per-class");
  if (!response.ok) return;  // these weights carry no figures
  const { classes } = await response.json();
  const labels = classes.map(({ label }) => label);
  $("classes").textContent = `It knows ${labels.slice(0, -1).join(", ")} and ${labels.at(-1)}, and takes anything else for one of these.`;
}

introduce();
form.addEventListener("submit", (event) => {
  event.preventDefault();
  classify($("file").files[0]);
});
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dropping");
});
document.addEventListener("dragleave", () => document.body.classList.remove("dropping"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  if (event.dataTransfer.files.length === 0) return;
  $("file").files = event.dataTransfer.files;
  classify(event.dataTransfer.files[0]);
});
