// The page's side of a panel: forecasts, rows, copy and send. Loaded by the WebUI, or by the standalone page.
window.hypermerge = window.hypermerge || (() => {
    const root = () => (typeof gradioApp === "function" ? gradioApp() : document);
    const find = (verb, field) => root().querySelector(`#hypermerge_${verb}_${field}`);

    // Questions about what is chosen: one at a time, for answers could overtake each other, and of those that wait
    // only the newest; the others are sent empty, which means nothing.
    const questions = {};
    const PATIENCE = 30000; // ms
    const UNCHANGED = {__type__: "update"}; // gradio's word for it

    async function ask(verb, values, count) {
        const state = questions[verb] ||= {newest: 0, under_way: 0, ended: null, end: () => {}};
        const inputs = Array.from(values).slice(0, count);
        const own = ++state.newest;
        while (state.under_way) await state.ended;
        inputs[0] = "";
        if (own !== state.newest) return inputs;
        state.under_way = own;
        state.ended = new Promise((resolve) => {
            state.end = () => {
                state.under_way = 0;
                resolve();
            };
        });
        setTimeout(() => { if (state.under_way === own) state.end(); }, PATIENCE);
        inputs[0] = String(own);
        return inputs;
    }

    // values: the answer, what is shown, and if the verb has a result its name and the last one that was filled in
    function answered(verb, values, count) {
        const [answer, ...shown] = Array.from(values).slice(0, count);
        const {asked, plan, name} = JSON.parse(answer || "{}");
        const state = questions[verb];
        if (!asked || Number(asked) !== state.under_way) return shown.map(() => UNCHANGED);
        state.end();
        const named = shown.length > 1 ? suggest(shown[1], shown[2], name) : [];
        return [plan ?? UNCHANGED, ...named];
    }

    // a name that somebody typed stays; one that was filled in makes way for a fresh one
    function suggest(out, suggested, fresh) {
        return fresh && (!out || out === suggested) ? [fresh, fresh] : [out, suggested];
    }

    async function copy(text) {
        const button = window.event?.currentTarget;
        try {
            await navigator.clipboard.writeText(text);
        } catch {
            if (!copyFromField(text)) return;
        }
        if (!(button instanceof HTMLElement) || button.dataset.label) return;
        button.dataset.label = button.textContent;
        button.textContent = "Copied";
        setTimeout(() => {
            button.textContent = button.dataset.label;
            delete button.dataset.label;
        }, 1500);
    }

    // over plain http from another machine a browser has no navigator.clipboard
    function copyFromField(text) {
        const area = document.createElement("textarea");
        area.value = text;
        area.style.cssText = "position: fixed; opacity: 0;";
        document.body.append(area);
        area.select();
        const copied = document.execCommand("copy");
        area.remove();
        return copied;
    }

    function send(text, kept = (tag) => tag) {
        const prompt = root().querySelector("#txt2img_prompt textarea");
        const before = prompt.value.replace(/<lora:([^:>]+)[^>]*>/g, kept).trim();
        prompt.value = before ? `${before} ${text}` : text;
        prompt.dispatchEvent(new Event("input", {bubbles: true}));
        if (typeof switch_to_txt2img === "function") switch_to_txt2img();
    }

    // in place of another model's of the same hyper-merge: NAME-1, NAME-2 … and NAME-model-rest
    function sendInstead(text) {
        const names = Array.from(text.matchAll(/<lora:([^:>]+)-\d+:/g), (found) => found[1]);
        const own = (name) => names.some((stem) => name.startsWith(`${stem}-`) && /-(\d+|rest)$/.test(name));
        send(text, (tag, name) => (own(name) ? "" : tag));
    }

    // writes into a text field as if a person had typed it
    function fill(id, text) {
        const box = root().querySelector(`#${id} textarea, #${id} input`);
        box.value = text;
        box.dispatchEvent(new Event("input", {bubbles: true}));
    }

    // a checkpoint that was just written becomes the WebUI's model
    function load(name) {
        if (typeof selectCheckpoint === "function") selectCheckpoint(name);
    }

    // presses the panel's own button, which stands out of sight
    const styles = (verb) => find(verb, "save_styles")?.click();

    // the job whose result the panel shows
    const shownJob = (verb) => find(verb, "result")?.querySelector(".hypermerge-report")?.dataset.job || "";

    // the WebUI's lists of styles: what its own refresh buttons do
    function stylesSaved() {
        for (const tab of ["txt2img", "img2img"]) root().querySelector(`#refresh_${tab}_styles`)?.click();
    }

    const row = (verb, name, index) => find(verb, `${name}_${index}_row`);

    // shows the next of the rows that are in the page already; the button goes with the last
    function addRow(verb, name, rows) {
        const spare = Array.from({length: rows}, (_, index) => row(verb, name, index))
            .filter((one) => one.classList.contains("hypermerge-spare"));
        spare[0]?.classList.remove("hypermerge-spare");
        find(verb, `${name}_add`).classList.toggle("hypermerge-spare", spare.length <= 1);
    }

    // the values of an empty row; it goes out of sight unless it is the first
    function clearRow(verb, name, index) {
        const cleared = row(verb, name, index);
        const graph = cleared.querySelector("details");
        if (graph) graph.open = false;
        cleared.classList.toggle("hypermerge-spare", index > 0);
        find(verb, `${name}_add`).classList.remove("hypermerge-spare");
        return [null, 1, "", ""];
    }

    // after the rows were filled at once: those that hold a LoRA are shown, and the first
    function showRows(verb, name, loras, rows) {
        const held = Array.from(loras).slice(0, rows).map(Boolean);
        held.forEach((there, index) => row(verb, name, index).classList.toggle("hypermerge-spare", index > 0 && !there));
        find(verb, `${name}_add`).classList.toggle("hypermerge-spare", held.every(Boolean));
    }

    // there is nothing to send to without a WebUI
    function markHost() {
        document.documentElement.classList.toggle("hypermerge-alone", !root().querySelector("#txt2img_prompt"));
    }
    if (typeof onUiLoaded === "function") onUiLoaded(markHost); else markHost();

    return {ask, answered, copy, send, sendInstead, fill, load,
        styles, shownJob, stylesSaved, addRow, clearRow, showRows};
})();
