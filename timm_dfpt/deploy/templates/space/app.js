// Classify an image in the browser. Names of classes come from data: they are written as text, never as HTML.
import { env, pipeline } from '@huggingface/transformers';

const at = (id) => document.getElementById(id);
const here = (path) => new URL(path, document.baseURI).href;

// Everything is in this folder; nothing is fetched from elsewhere.
env.allowRemoteModels = false;
env.allowLocalModels = true;
// A path and not an address, which transformers.js takes for the Hub's.
env.localModelPath = new URL('./', document.baseURI).pathname;
env.useBrowserCache = false;
env.useWasmCache = false;
env.backends.onnx.wasm.numThreads = 1;
env.backends.onnx.wasm.wasmPaths = { wasm: here('lib/ort-wasm-simd-threaded.wasm') };

let classify = null;
let turn = 0;

function show(results) {
  at('results').replaceChildren(...results.map(({ label, score }) => {
    const item = document.createElement('li');
    const line = document.createElement('div');
    line.className = 'line';
    const name = document.createElement('span');
    name.className = 'name';
    name.textContent = label;
    const share = document.createElement('span');
    share.className = 'share';
    share.textContent = `${(100 * score).toFixed(1)} %`;
    line.append(name, share);
    const bar = document.createElement('div');
    bar.className = 'bar';
    const filled = document.createElement('div');
    filled.style.width = `${100 * score}%`;
    bar.append(filled);
    item.append(line, bar);
    return item;
  }));
}

async function look(address) {
  const mine = ++turn;
  at('preview').src = address;
  at('preview').hidden = false;
  at('status').textContent = 'Looking ...';
  // Let the page show the image first.
  await new Promise((resolve) => setTimeout(resolve));
  try {
    const start = performance.now();
    const results = await classify(address, { top_k: 5 });
    const time = performance.now() - start;
    if (mine !== turn) return;
    show(results);
    at('status').textContent = `${time.toFixed(0)} ms, image loading included`;
    document.body.dataset.state = 'done';
  } catch (error) {
    if (mine !== turn) return;
    show([]);
    at('status').textContent = `This image cannot be read (${error.message ?? error}). Try a JPEG, PNG or WebP.`;
    document.body.dataset.state = 'failed';
  }
}

let last = null;
function take(file) {
  if (!file || !classify) return;
  if (last) URL.revokeObjectURL(last);
  last = URL.createObjectURL(file);
  look(last);
}

at('file').addEventListener('change', (event) => take(event.target.files[0]));
const drop = at('drop');
drop.addEventListener('keydown', (event) => { if (event.key === 'Enter' || event.key === ' ') at('file').click(); });
for (const kind of ['dragenter', 'dragover']) {
  drop.addEventListener(kind, (event) => { event.preventDefault(); drop.classList.add('over'); });
}
for (const kind of ['dragleave', 'drop']) {
  drop.addEventListener(kind, (event) => { event.preventDefault(); drop.classList.remove('over'); });
}
drop.addEventListener('drop', (event) => take(event.dataTransfer.files[0]));
document.addEventListener('paste', (event) => take(event.clipboardData.files[0]));

try {
  const settings = await (await fetch(here('settings.json'))).json();
  at('title').textContent = document.title = settings.title;
  if (settings.card) at('card').href = settings.card;
  classify = await pipeline('image-classification', 'model', { dtype: settings.dtype, device: 'wasm' });
  at('status').textContent = 'Ready.';
  // ?image=photo.jpg looks at an image of this folder at once.
  const given = new URLSearchParams(location.search).get('image');
  if (given && new URL(given, document.baseURI).origin === location.origin) await look(here(given));
} catch (error) {
  at('status').textContent = `The model could not be loaded (${error.message ?? error}).`;
  document.body.dataset.state = 'failed';
}
