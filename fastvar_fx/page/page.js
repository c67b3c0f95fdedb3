"use strict";

const at = (id) => document.getElementById(id);
const all = (selector) => [...document.querySelectorAll(selector)];

// Calls `show` with the slider's value, now and whenever it moves; `text` says what it stands for.
function slider(id, text, show) {
  const input = at(id);
  if (!input) return;
  const update = () => {
    const value = Number(input.value);
    input.parentElement.querySelector("output").textContent = text(value);
    input.setAttribute("aria-valuetext", text(value));
    show(value);
  };
  input.addEventListener("input", update);
  update();
}

function move(id, value) {
  at(id).value = value;
  at(id).dispatchEvent(new Event("input"));
}

// --- images, and the line between dense and pruned ---

const pictures = [...new Set(all(".sample").map((sample) => sample.parentElement))];

function showImage(chosen) {
  for (const picture of pictures)
    [...picture.querySelectorAll(".sample")].forEach((sample, i) => (sample.hidden = i !== chosen));
  at("psnr").textContent = document.querySelector(".sample:not([hidden])[data-note]").dataset.note;
}

showImage(0);
slider("image", (i) => `${i + 1} of ${Number(at("image").max) + 1}`, showImage);
slider("wipe", (share) => `${share} %`, (share) => at("wiped").style.setProperty("--at", `${share}%`));
for (const type of ["pointerdown", "pointermove"])
  at("wiped").addEventListener(type, (event) => {
    const box = at("wiped").getBoundingClientRect();
    if (event.buttons) move("wipe", (100 * (event.clientX - box.left)) / box.width);
  });

// --- kept tokens: the picture in colour, cut out by how many branches keep each token ---

const { steps, blocks, branches, maps } = JSON.parse(at("kept-data").textContent);

function keptShares(step, block, branch) {
  const chosen = maps.filter(
    (map) =>
      map.step === step &&
      (block === 0 || map.block === block - 1) &&
      (branch === 0 || map.branch === branch - 1)
  );
  const shares = new Float32Array(steps[step].rows * steps[step].columns);
  for (const { bits } of chosen)
    for (let i = 0; i < shares.length; i++)
      shares[i] += ((parseInt(bits[i >> 2], 16) >> (3 - (i & 3))) & 1) / chosen.length;
  return { shares, count: chosen.length };
}

function drawKept() {
  const [step, block, branch] = ["step", "block", "branch"].map((id) => Number(at(id).value));
  const { rows, columns, kept, tokens } = steps[step];
  const { shares, count } = keptShares(step, block, branch);
  const dense = count === 0 && kept > 0;
  const mask = new ImageData(columns, rows);
  for (let i = 0; i < shares.length; i++) mask.data[4 * i + 3] = dense ? 255 : 255 * shares[i];
  const small = new OffscreenCanvas(columns, rows);
  small.getContext("2d").putImageData(mask, 0, 0);

  const picture = at("under"), canvas = at("kept");
  canvas.width = picture.naturalWidth;
  canvas.height = picture.naturalHeight;
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  context.drawImage(small, 0, 0, canvas.width, canvas.height);
  context.globalCompositeOperation = "source-in";
  context.drawImage(picture, 0, 0);

  const who = count === 1 ? "1 branch keeps" : `${count} branches, each keeps`;
  const some = `${who} ${kept} of ${tokens} tokens`;
  const none = kept ? `dense here: all ${tokens} tokens` : "no token is kept";
  const text = count ? some : none;
  at("kept-text").textContent = text;
  canvas.setAttribute("aria-label", `Kept tokens over the first image: ${text}`);
}

at("under").decode().then(() => {
  slider("step", (i) => steps[i].label, drawKept);
  slider("block", (i) => (i ? blocks[i - 1] : "all"), drawKept);
  slider("branch", (i) => (i ? branches[i - 1] : "all"), drawKept);
});

// --- the image after each step ---

slider(
  "grown",
  (i) => all(".strip img")[i].dataset.label,
  (chosen) => {
    for (const figure of all(".grown"))
      figure.querySelectorAll(".strip img").forEach((image, i) => {
        image.classList.toggle("now", i === chosen);
        if (i === chosen) figure.querySelector(".chosen").src = image.src;
      });
  }
);
for (const figure of all(".grown"))
  figure.querySelectorAll(".strip img").forEach((image, i) => image.addEventListener("click", () => move("grown", i)));
