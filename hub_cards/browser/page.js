// The page: a tab for each kind of tokenizer that this Space carries.

import { Engine } from "./engine.js";
import { ImagePanel } from "./image.js";
import { SpeechPanel } from "./speech.js";

const PANELS = { image: ImagePanel, speech: SpeechPanel };

async function start() {
  if (!globalThis.WebAssembly || !globalThis.OffscreenCanvas)
    throw new Error("This browser is too old for this page: it needs WebAssembly and OffscreenCanvas.");
  const response = await fetch("models.json", { cache: "no-cache" });
  if (!response.ok) throw new Error(`The list of models could not be loaded (${response.status}).`);
  const about = await response.json();
  const engine = new Engine(about);
  const kinds = Object.keys(PANELS).filter((kind) => about[kind]);
  const tabs = kinds.map((kind) => document.getElementById(`${kind}-tab`));
  function choose(chosen) {
    kinds.forEach((kind, i) => {
      tabs[i].hidden = false;
      tabs[i].setAttribute("aria-selected", i === chosen);
      tabs[i].tabIndex = i === chosen ? 0 : -1;
      document.getElementById(kind).hidden = i !== chosen;
    });
  }
  kinds.forEach((kind, i) => {
    new PANELS[kind](engine);
    tabs[i].onclick = () => choose(i);
    tabs[i].onkeydown = ({ key }) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[key];
      if (!step) return;
      const next = (i + step + kinds.length) % kinds.length;
      choose(next);
      tabs[next].focus();
    };
  });
  document.querySelector(".tabs").hidden = kinds.length < 2;
  choose(0);
}

start().catch((error) => {
  const broken = document.getElementById("broken");
  broken.textContent = error.message;
  broken.hidden = false;
});
