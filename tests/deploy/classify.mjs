// Load a student with transformers.js from files, and say what it makes of images: node classify.mjs NODE_MODULES REPO IMAGE...
import { readFileSync } from 'node:fs';
import path from 'node:path';
import { pathToFileURL } from 'node:url';

const [modules, repo, ...images] = process.argv.slice(2);
const entry = path.join(modules, '@huggingface/transformers/dist/transformers.node.mjs');
const { AutoProcessor, AutoModelForImageClassification, RawImage, env, pipeline } = await import(pathToFileURL(entry).href);
env.allowRemoteModels = false;
env.localModelPath = path.dirname(repo);
env.logLevel = 40;
const name = path.basename(repo);
const processor = await AutoProcessor.from_pretrained(name);
const results = { processor: processor.image_processor.constructor.name, pixels: [], logits: {}, labels: {} };
const inputs = [];
for (const image of images) {
  inputs.push((await processor(await RawImage.read(image))).pixel_values);
  results.pixels.push({ dims: inputs.at(-1).dims, data: Array.from(inputs.at(-1).data) });
}
for (const dtype of ['fp32', 'fp16', 'q8']) {
  const model = await AutoModelForImageClassification.from_pretrained(name, { dtype });
  results.logits[dtype] = [];
  for (const pixel_values of inputs) {
    const { logits } = await model({ pixel_values });
    results.logits[dtype].push(Array.from(logits.data));
  }
  const classify = await pipeline('image-classification', name, { dtype });
  results.labels[dtype] = [];
  for (const image of images) results.labels[dtype].push((await classify(image, { top_k: 3 })).map((each) => each.label));
}
console.log(JSON.stringify(results));
