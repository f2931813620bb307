"""The HTTP API: submit a job, ask how it goes, cancel it; parameters are those of the spec."""

from __future__ import annotations

import secrets
from typing import Any

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBasic, HTTPBasicCredentials

from . import __version__
from .errors import REQUEST_IS_WRONG, HypermergeError, SpecError
from .jobs.runner import Runner, forecast
from .jobs.verbs import VERBS, find_verb

ROOT = "/hypermerge/v1"


def mount(app: FastAPI, runner: Runner, credentials: dict[str, str] | None = None) -> None:
    """Add the routes to an app. credentials: user → password, honoured as HTTP basic authentication; None: open.

    An empty dictionary lets nobody in: credentials were meant to be there.
    """
    guard = [] if credentials is None else [Depends(_guard(credentials))]

    def route(path: str, endpoint: Any, method: str) -> None:
        app.add_api_route(ROOT + path, endpoint, methods=[method], dependencies=guard, response_model=None)

    async def submit(request: Request) -> JSONResponse:
        body = await _json_body(request)
        return await run_in_threadpool(_answer, lambda: _submit(runner, body), 202)

    route("/schema", lambda: schema(), "GET")
    route("/checkpoints", lambda: {"checkpoints": runner.host.checkpoints()}, "GET")
    route("/loras", lambda: {"loras": runner.host.loras()}, "GET")
    route("/jobs", submit, "POST")
    route("/jobs", lambda: {"jobs": [job.to_json() for job in runner.jobs()]}, "GET")
    route("/jobs/{job_id}", _of_job(runner, lambda job: None), "GET")
    route("/jobs/{job_id}/cancel", _of_job(runner, lambda job: job.cancel()), "POST")


def schema() -> dict[str, Any]:
    """Every verb with its parameters as a JSON Schema."""
    verbs = {v.id: {"title": v.title, "help": v.help, "parameters": v.spec.schema()} for v in VERBS.values()}
    return {"version": __version__, "verbs": verbs}


def _of_job(runner: Runner, act: Any) -> Any:
    def endpoint(job_id: str) -> JSONResponse:
        try:
            job = runner.get(job_id)
        except SpecError as error:
            return JSONResponse({"error": error.to_json()}, 404)
        act(job)
        return JSONResponse(job.to_json())

    return endpoint


async def _json_body(request: Request) -> Any:
    # other content types could be sent by a foreign web page without asking the browser first
    if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
        raise HTTPException(415, "Send application/json.")
    try:
        return await request.json()
    except ValueError:
        raise HTTPException(400, "The body is not JSON.") from None


def _submit(runner: Runner, body: Any) -> dict[str, Any]:
    if not isinstance(body, dict) or set(body) - {"verb", "params", "dry_run"}:
        raise SpecError("A job is an object with verb, params and, if you like, dry_run.")
    if not body.get("dry_run"):
        return runner.submit(body.get("verb"), body.get("params")).to_json()
    verb = find_verb(body.get("verb"))
    return forecast(verb, verb.spec.from_json(body.get("params")), runner.host)


def _answer(work: Any, status: int) -> JSONResponse:
    try:
        return JSONResponse(work(), status)
    except HypermergeError as error:
        return JSONResponse({"error": error.to_json()}, 422 if error.exit_code == REQUEST_IS_WRONG else 500)


def _guard(credentials: dict[str, str]) -> Any:
    def check(given: HTTPBasicCredentials = Depends(HTTPBasic())) -> None:  # noqa: B008 - FastAPI's way
        expected = credentials.get(given.username)
        if expected is None or not secrets.compare_digest(given.password.encode(), expected.encode()):
            raise HTTPException(401, "Incorrect username or password", {"WWW-Authenticate": "Basic"})

    return check
