// llama.cpp through node-llama-cpp, as one of the engines of peers.py: see peers_child.py for what
// it is asked and answers.
//
//   node peers_llama.mjs PACKAGES '{"threads": N, "length": N, "models": {NAME: FILE}}'
import {statSync} from "node:fs";
import {createInterface} from "node:readline";
import {createRequire} from "node:module";
import {pathToFileURL} from "node:url";

const [packages, given] = [process.argv[2], JSON.parse(process.argv[3])];
const require = createRequire(`${packages}/package.json`);
const {getLlama} = await import(pathToFileURL(require.resolve("node-llama-cpp")).href);

const say = (answer) => process.stdout.write(JSON.stringify(answer) + "\n");
const seconds = (since) => (performance.now() - since) / 1000;

const llama = await getLlama({
    gpu: false, build: "never", skipDownload: true, logLevel: "error",
    logger: (level, message) => console.error(`llama.cpp ${level}: ${message}`),
    maxThreads: given.threads
});
const sequences = {}, streams = {};
for (const [name, path] of Object.entries(given.models)) {
    const model = await llama.loadModel({modelPath: path, gpuLayers: 0});
    const size = {contextSize: given.length, batchSize: 512};
    sequences[name] = (await model.createContext({...size, threads: given.threads})).getSequence();
}
const versions = {"llama.cpp": llama.llamaCppRelease.release, "llama.cpp uses": llama.systemInfo};
const sizes = Object.entries(given.models).map(([name, path]) => [name, statSync(path).size]);
say({versions, bytes: Object.fromEntries(sizes)});

const next = async (name) => (await streams[name].next()).value;

async function prefill({model, ids}) {
    await streams[model]?.return();
    await sequences[model].clearHistory();
    streams[model] = sequences[model].evaluate(ids, {temperature: 0, yieldEogToken: true});
    const start = performance.now();
    const token = await next(model);
    return {seconds: seconds(start), token};
}

async function decode({model, count}) {
    const times = [], tokens = [];
    for (let i = 0; i < count; i++) {
        const start = performance.now();
        tokens.push(await next(model));
        times.push(seconds(start));
    }
    return {seconds: times, tokens};
}

async function tokenize({model, text}) {
    return {ids: [...sequences[model].model.tokenize(text)]};
}

const answers = {prefill, decode, tokenize, parts: async () => ({seconds: {}})};
for await (const line of createInterface({input: process.stdin})) {
    const request = JSON.parse(line);
    say(await answers[request.do](request));
}
process.exit(0);
