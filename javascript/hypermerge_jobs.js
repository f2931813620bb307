// A page's jobs: their ids and bars, and what is asked about them until they are over. No connection is held meanwhile.
window.hypermergeJobs = window.hypermergeJobs || (() => {
    // A job is asked after when its bar has ended, else seldom: gradio redraws the page for every answer.
    const SOON = 300, BRIEF = 2000, SELDOM = 5000, AT_MOST = 10000, PATIENCE = 20000; // ms
    const SILENT = "No answer from the server. The job goes on there, and its result will be here when the server is back.";
    const ANOTHER = "The server was started again: reload the page to see what became of the job.";
    const STARTERS = ["run", "preview", "try", "take_back"];

    // verb: {task, over, bar: whether it has one, known: whether the server has said so, news: the last, pause, lost: the last
    // pauses, timer, silence}
    const jobs = {};
    let server = null; // gradio's number for the server that sent this page

    const root = () => (typeof gradioApp === "function" ? gradioApp() : document);
    const find = (verb, field) => root().querySelector(`#hypermerge_${verb}_${field}`);
    const underWay = (verb) => Boolean(jobs[verb]) && !jobs[verb].over;
    const goesOn = (verb, job) => jobs[verb] === job && !job.over;

    function newId() {
        return `task(${Math.random().toString(36).slice(2, 15)}${Date.now().toString(36)})`;
    }

    // gradio 3 passes the inputs and then the outputs; only the inputs may go back
    function start(verb, values, count) {
        const inputs = Array.from(values).slice(0, count);
        if (!underWay(verb)) begin(verb, newId());
        inputs[0] = jobs[verb].task;
        return inputs;
    }

    function begin(verb, task) {
        jobs[verb] = {task, over: false, bar: false, known: false, news: "", pause: 0, lost: 0, timer: null, silence: null};
        say(verb, "");
        setRunning(verb, true);
        watch(verb);
        expectAnswer(verb);
    }

    function watch(verb) {
        const job = jobs[verb], anchor = find(verb, "progress"), since = Date.now();
        job.bar = true;
        const barEnded = () => {
            if (!goesOn(verb, job)) return;
            job.bar = false;
            // while its start is not answered, only if it did arrive
            if (job.timer || job.known) askIn(verb, Date.now() - since > BRIEF ? SOON : Math.max(SOON, job.pause));
        };
        if (typeof requestProgress === "function") { // the WebUI's own bar
            requestProgress(job.task, anchor, null, barEnded, ({active, queued}) => { job.known ||= active || queued; });
        } else {
            poll(verb, job, anchor).then(barEnded);
        }
    }

    async function poll(verb, job, anchor) {
        const bar = document.createElement("div");
        bar.className = "progressDiv";
        bar.innerHTML = '<div class="progress"></div>';
        anchor.parentElement.insertBefore(bar, anchor);
        let state = null;
        while (goesOn(verb, job) && (!state || state.status === "queued" || state.status === "running")) {
            await new Promise((resolve) => setTimeout(resolve, 250));
            state = await json(`hypermerge/v1/jobs/${encodeURIComponent(job.task)}`);
            if (!state) continue;
            job.known = true;
            const percent = `${Math.round(state.progress * 100)}%`;
            bar.firstChild.style.width = percent;
            bar.firstChild.textContent = `${percent} ${state.text}`;
        }
        bar.remove();
    }

    // null for whatever went wrong
    function json(address) {
        return fetch(address, {cache: "no-store", signal: AbortSignal.timeout?.(PATIENCE)})
            .then((answer) => (answer.ok ? answer.json() : null)).catch(() => null);
    }

    const serverNow = async () => (await json("app_id"))?.app_id;

    function askIn(verb, pause) {
        const job = jobs[verb];
        clearTimeout(job.timer);
        job.timer = setTimeout(() => askNow(verb, job), pause);
    }

    async function askNow(verb, job) {
        job.timer = null;
        const [before, now] = [await server, await serverNow()];
        if (!goesOn(verb, job)) return;
        if (before && !now) {
            lost(verb, job);
        } else if (before && before !== now) { // there, gradio's numbers of our events may be those of others
            job.over = true;
            setRunning(verb, false);
            setInert(verb, true);
            say(verb, ANOTHER);
        } else {
            expectAnswer(verb);
            find(verb, "ask").click();
        }
    }

    function expectAnswer(verb) {
        const job = jobs[verb];
        clearTimeout(job.silence);
        job.silence = setTimeout(() => {
            if (goesOn(verb, job) && !document.hidden) say(verb, SILENT);
        }, PATIENCE);
    }

    // after every answer about a job, and where none came: then the news are those that were there before
    function follow(verb, news) {
        const job = jobs[verb];
        if (!underWay(verb)) return;
        clearTimeout(job.silence);
        const about = JSON.parse(news || "{}");
        if (about.task !== job.task || news === job.news) {
            lost(verb, job);
            return;
        }
        Object.assign(job, {news, lost: 0});
        say(verb, "");
        if (about.over) {
            ended(verb);
        } else if (job.bar) {
            askIn(verb, SELDOM);
        } else { // it is finishing, or the WebUI's bar gave up because a connection broke
            job.pause = Math.min(2 * job.pause || SOON, SELDOM);
            if (job.pause > BRIEF) watch(verb);
            askIn(verb, job.pause);
        }
    }

    function lost(verb, job) {
        job.lost = Math.min(2 * job.lost || SOON, AT_MOST);
        if (job.lost > BRIEF) say(verb, SILENT);
        askIn(verb, job.lost);
    }

    // as the page opens: the lists are fresh now, and a job that is under way is watched as if it had been started here
    function loaded(verb, news) {
        server ||= serverNow();
        find(verb, "panel")?.classList.add("hypermerge-loaded");
        const {task, over} = JSON.parse(news || "{}"), own = jobs[verb];
        if (own?.over) { // its result was here sooner than the older one that came now
            own.over = false;
            setRunning(verb, true);
            askIn(verb, 0);
        } else if (!own && task && !over) {
            begin(verb, task);
            follow(verb, news);
        }
    }

    function ended(verb) {
        jobs[verb].over = true;
        setRunning(verb, false);
        // the cards of the WebUI's LoRA tabs: what its own refresh button does
        for (const tab of ["txt2img", "img2img"]) {
            root().querySelector(`#${tab}_lora_extra_refresh_internal`)?.click();
        }
        // a checkpoint was written: the WebUI's list of them too, which keeps its choice
        if (find(verb, "result")?.querySelector(".hypermerge-load")) {
            root().querySelector("#refresh_sd_model_checkpoint")?.click();
        }
        find(verb, "over").click();
    }

    function setRunning(verb, running) {
        find(verb, "panel").classList.toggle("hypermerge-running", running);
        setInert(verb, running);
    }

    // not by style alone: a key would press them
    function setInert(verb, inert) {
        for (const name of STARTERS) find(verb, name)?.toggleAttribute("inert", inert);
    }

    // beside the bar, for what gradio cannot tell
    function say(verb, text) {
        const anchor = find(verb, "progress");
        let note = anchor.parentElement.querySelector(".hypermerge-silence");
        if (!text) {
            note?.remove();
            return;
        }
        if (!note) {
            note = document.createElement("div");
            note.className = "hypermerge-note hypermerge-silence";
            anchor.parentElement.insertBefore(note, anchor);
        }
        note.textContent = text;
    }

    return {start, follow, loaded, task: (verb) => (underWay(verb) ? jobs[verb].task : "")};
})();
