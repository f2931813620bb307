// A graph of block weights beside the text field that holds them: a bar per block, dragged between 0 and 1.
// The field's text is the truth; it may also be a preset's name or named ranges, which the graph can read.
window.hypermergeBlocks = window.hypermergeBlocks || (() => {
    const SVG = "http://www.w3.org/2000/svg";
    const WIDTH = 36, HEIGHT = 100, TOP = 14, BOTTOM = 20; // of a bar, and of the room for its numbers and names
    const STEP = 0.05;
    const root = () => (typeof gradioApp === "function" ? gradioApp() : document);
    let formats = null;

    // all formats that the page knows: {label, architectures, blocks, presets: {name: values}}
    function known() {
        formats ||= JSON.parse(root().querySelector(".hypermerge-block-formats").textContent);
        return formats;
    }

    const field = (box) => root().querySelector(`#${box.dataset.blocks} textarea, #${box.dataset.blocks} input`);

    // the format for the model that the forecast has recognised; for SD1 until there is one
    function usual(box) {
        const mark = root().querySelector(`#${box.dataset.plan} [data-blocks]`);
        return known().find((format) => format.blocks.length === Number(mark?.dataset.blocks)) || known()[0];
    }

    const isNumber = (text) => /^[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$/i.test(text);

    // {format, values}, or null for a text that means nothing in the format
    function read(text, format) {
        text = text.trim();
        if (!text) return {format, values: format.blocks.map(() => 1)};
        const preset = format.presets[text.toUpperCase()];
        if (preset) return {format, values: [...preset]};
        if (/[=:]/.test(text)) {
            const values = ranges(text, format);
            return values && {format, values};
        }
        const numbers = text.split(",").map((part) => part.trim());
        const own = [format, ...known()].find((one) => one.blocks.length === numbers.length);
        return own && numbers.every(isNumber) ? {format: own, values: numbers.map(Number)} : null;
    }

    const ALIASES = {M00: "MID", TE: "BASE", CLIP: "BASE"};

    function ranges(text, format) {
        const values = {};
        let rest = 1, base = 1;
        for (const part of text.split(",").map((one) => one.trim()).filter(Boolean)) {
            const found = part.match(/^([A-Za-z]+\d*)(?:\s*-\s*([A-Za-z]+\d*))?\s*[=:]\s*(\S+)$/);
            if (!found || !isNumber(found[3])) return null;
            const [first, last] = [found[1], found[2]].map((name) => name && (ALIASES[name.toUpperCase()] || name.toUpperCase()));
            const value = Number(found[3]);
            if (first === "DEFAULT" && !last) rest = value;
            else if (first === "BASE" && !last) base = value;
            else {
                const blocks = span(first, last, format);
                if (!blocks) return null;
                for (const block of blocks) values[block] = value;
            }
        }
        return format.blocks.map((block) => (block === "BASE" ? base : values[block] ?? rest));
    }

    function span(first, last, format) {
        // a short format leaves blocks out, but a range may name them
        const longest = known().reduce((a, b) => (
            b.architectures[0] === format.architectures[0] && b.blocks.length > a.blocks.length ? b : a), format);
        const order = [...longest.blocks.slice(1), "TIME", "LABEL", "OUT"];
        const group = order.filter((block) => block.startsWith(first) && /^\d*$/.test(block.slice(first.length)));
        if (!last) return group.length ? group : null;
        const [start, stop] = [order.indexOf(first), order.indexOf(last)];
        return start < 0 || stop < start ? null : order.slice(start, stop + 1);
    }

    const shown = (value) => String(Math.round(value * 100) / 100);

    function write(box, text) {
        const target = field(box);
        target.value = text;
        target.dispatchEvent(new Event("input", {bubbles: true}));
    }

    function toggle(box) {
        if (!box.open) return;
        const target = field(box);
        if (!box.querySelector("svg")) build(box);
        if (target.dataset.hypermergeGraph !== box.id) {
            target.dataset.hypermergeGraph = box.id;
            target.addEventListener("input", () => { if (box.open) draw(box); });
        }
        box.hypermergeFormat = usual(box);
        draw(box);
    }

    function build(box) {
        const tools = document.createElement("div");
        tools.append(choice("format", known().map((format) => format.label)), choice("preset", []));
        const note = document.createElement("span");
        note.className = "hypermerge-blocks-note";
        tools.append(note);
        const svg = document.createElementNS(SVG, "svg");
        box.append(tools, svg);
        const [format, preset] = tools.querySelectorAll("select");
        format.addEventListener("change", () => changeFormat(box, known()[format.selectedIndex]));
        preset.addEventListener("change", () => preset.value && write(box, preset.value));
        svg.addEventListener("pointerdown", (event) => { svg.setPointerCapture(event.pointerId); drag(box, event); });
        svg.addEventListener("pointermove", (event) => { if (event.buttons & 1) drag(box, event); });
        svg.addEventListener("keydown", (event) => step(box, event));
    }

    function choice(name, options) {
        const select = document.createElement("select");
        select.className = `hypermerge-blocks-${name}`;
        select.title = name === "format" ? "How many values, and for which model" : "Values for a common purpose";
        select.append(...options.map((text) => new Option(text)));
        return select;
    }

    function changeFormat(box, format) {
        const before = box.hypermergeState;
        box.hypermergeFormat = format;
        const text = field(box).value;
        if (before && isNumber(text.split(",")[0].trim())) { // a list of numbers has to follow
            const values = Object.fromEntries(before.format.blocks.map((block, i) => [block, before.values[i]]));
            write(box, format.blocks.map((block) => shown(values[block] ?? 1)).join(","));
        } else draw(box);
    }

    function draw(box) {
        const state = read(field(box).value, box.hypermergeFormat);
        box.querySelector(".hypermerge-blocks-note").textContent = state ? "" : "The text is no list for this format.";
        box.hypermergeState = state;
        const {format, values} = state || {format: box.hypermergeFormat, values: box.hypermergeFormat.blocks.map(() => 0)};
        box.hypermergeFormat = format;
        const [formatChoice, preset] = box.querySelectorAll("select");
        formatChoice.selectedIndex = known().indexOf(format);
        preset.replaceChildren(new Option("Preset …", ""), ...Object.keys(format.presets).map((name) => new Option(name, name)));
        const text = field(box).value.trim().toUpperCase();
        preset.value = text in format.presets ? text : "";
        const svg = box.querySelector("svg");
        const focused = svg.contains(document.activeElement) ? document.activeElement.dataset.index : null;
        svg.setAttribute("viewBox", `0 0 ${format.blocks.length * WIDTH} ${TOP + HEIGHT + BOTTOM}`);
        svg.replaceChildren(...format.blocks.map((block, index) => bar(block, values[index], index)));
        if (focused !== null) svg.querySelector(`[data-index="${focused}"]`)?.focus();
    }

    function bar(block, value, index) {
        const make = (name, attributes, text) => {
            const made = document.createElementNS(SVG, name);
            for (const key in attributes) made.setAttribute(key, attributes[key]);
            if (text !== undefined) made.textContent = text;
            return made;
        };
        const height = HEIGHT * Math.min(Math.max(value, 0), 1), x = index * WIDTH;
        const group = make("g", {
            role: "slider", tabindex: 0, "data-index": index, "data-block": block, "aria-label": block,
            "aria-valuemin": 0, "aria-valuemax": 1, "aria-valuenow": shown(value),
        });
        group.append(
            make("rect", {class: "hypermerge-blocks-room", x: x + 2, y: TOP, width: WIDTH - 4, height: HEIGHT}),
            make("rect", {class: "hypermerge-blocks-bar", x: x + 2, y: TOP + HEIGHT - height, width: WIDTH - 4, height}),
            make("text", {x: x + WIDTH / 2, y: TOP - 4}, shown(value)),
            make("text", {x: x + WIDTH / 2, y: TOP + HEIGHT + 14}, block),
        );
        return group;
    }

    function set(box, index, value) {
        const {format, values} = box.hypermergeState || {
            format: box.hypermergeFormat, values: box.hypermergeFormat.blocks.map(() => 0)};
        if (values[index] === value && box.hypermergeState) return;
        values[index] = value;
        box.hypermergeFormat = format;
        write(box, values.map(shown).join(","));
    }

    function drag(box, event) {
        const svg = box.querySelector("svg");
        const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
        const index = Math.floor(point.x / WIDTH);
        if (index < 0 || index >= box.hypermergeFormat.blocks.length) return;
        const value = Math.min(Math.max(1 - (point.y - TOP) / HEIGHT, 0), 1);
        set(box, index, Math.round(value / STEP) * STEP);
        event.preventDefault();
    }

    function step(box, event) {
        const index = Number(event.target.dataset?.index ?? NaN);
        const change = {ArrowUp: STEP, ArrowDown: -STEP}[event.key];
        if (Number.isNaN(index) || !change) return;
        const value = (box.hypermergeState?.values[index] ?? 0) + change;
        set(box, index, Math.min(Math.max(Math.round(value / STEP) * STEP, 0), 1));
        event.preventDefault();
    }

    return {toggle, read: (text, count) => read(text, known().find((format) => format.blocks.length === count))};
})();
