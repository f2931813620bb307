"""start.py's decisions: when to make an environment, which browser, how results add up."""

import importlib.util
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import start
from dev import checks, chromium, environments


def write(file: Path, text: str) -> Path:
    file.write_text(text, encoding="utf-8")
    return file


class TestVersionCheck:
    def test_accepts_3_10_and_later(self):
        assert start.check_python((3, 10, 0)) is None
        assert start.check_python((4, 0, 0)) is None

    def test_says_what_is_needed_and_what_there_is(self):
        message = start.check_python((3, 9, 18))
        assert message is not None
        assert "3.10 or newer" in message
        assert "this one is 3.9" in message


class TestVerbs:
    def test_demo_and_ui_have_modules_of_their_own(self):
        assert start.module_command("demo", ["--x"]) == ["-m", "benchmarks.family.demo", "--x"]
        assert start.module_command("ui", []) == ["-m", "lib_hypermerge.ui"]

    @pytest.mark.parametrize("verb", start.MODULE_OF_VERB)
    def test_every_module_of_a_verb_can_be_run(self, verb):
        name = start.MODULE_OF_VERB[verb]
        spec = importlib.util.find_spec(name)
        assert spec is not None
        if spec.submodule_search_locations is not None:
            assert importlib.util.find_spec(f"{name}.__main__") is not None

    def test_any_other_verb_goes_to_the_command_line(self):
        assert start.module_command("merge", ["a", "b"]) == ["-m", "lib_hypermerge", "merge", "a", "b"]

    @pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
    def test_no_verb_prints_the_help_text(self, arguments, capsys):
        assert start.main(arguments) == 0
        assert "start.py demo" in capsys.readouterr().out


class TestPage:
    """python -m lib_hypermerge.ui, which is start.py ui."""

    def test_the_browser_is_called_when_the_page_answers(self, tmp_path):
        seen = tmp_path / "seen.txt"
        browser = write(
            tmp_path / "browser.py",
            "import sys, urllib.request as r\n"
            f"open({str(seen)!r}, 'w').write(sys.argv[1] + ' ' + str(r.urlopen(sys.argv[1]).status))\n",
        )
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        env = {name: value for name, value in os.environ.items() if name != "CI"}
        env["BROWSER"] = f"{sys.executable} {browser} %s"
        folders = ["--checkpoints", str(tmp_path / "c"), "--loras", str(tmp_path / "l")]
        command = [sys.executable, "-m", "lib_hypermerge.ui", "--port", str(port), *folders]
        with subprocess.Popen(command, cwd=start.ROOT, env=env, stdout=subprocess.PIPE, text=True) as page:
            try:
                deadline = time.monotonic() + 90
                while not (seen.exists() and seen.read_text()):
                    assert page.poll() is None
                    assert time.monotonic() < deadline
                    time.sleep(0.1)
            finally:
                page.terminate()
            printed = page.stdout.read()
        assert seen.read_text() == f"http://127.0.0.1:{port} 200"
        assert f"http://127.0.0.1:{port}" in printed
        assert "--no-browser" in printed

    @pytest.mark.parametrize(("arguments", "ci"), [(["--no-browser"], ""), ([], "true")])
    def test_no_browser_where_none_is_wanted(self, tmp_path, monkeypatch, capsys, arguments, ci):
        ui = importlib.import_module("lib_hypermerge.ui.__main__")
        opened = []
        monkeypatch.setenv("CI", ci)
        monkeypatch.setattr(ui.webbrowser, "open", opened.append)
        monkeypatch.setattr(ui, "make_app", lambda *_: None)
        monkeypatch.setattr(ui, "serve", lambda app, host, port, ready: ready())
        folders = ["--checkpoints", str(tmp_path / "c"), "--loras", str(tmp_path / "l"), "--host", "0.0.0.0"]
        assert ui.main([*folders, *arguments]) == 0
        assert "http://127.0.0.1:7870" in capsys.readouterr().out
        assert opened == []


class TestStamp:
    def test_comments_order_and_blank_lines_do_not_change_the_digest(self, tmp_path):
        plain = write(tmp_path / "a.txt", "x==1\ny==2\n")
        commented = write(tmp_path / "b.txt", "# why\ny==2  # because\n\nx==1\n")
        assert environments.digest(plain) == environments.digest(commented)

    def test_a_pin_in_an_included_file_changes_it(self, tmp_path):
        inner = write(tmp_path / "inner.txt", "x==1\n")
        outer = write(tmp_path / "outer.txt", "-r inner.txt\ny==2\n")
        before = environments.digest(outer)
        write(inner, "x==2\n")
        assert environments.digest(outer) != before

    def test_another_python_changes_it(self, tmp_path):
        file = write(tmp_path / "a.txt", "x==1\n")
        assert environments.digest(file, (3, 10)) != environments.digest(file, (3, 11))

    def test_ready_only_with_interpreter_and_the_right_stamp(self, tmp_path):
        assert not environments.is_ready(tmp_path / "absent", "abc")
        python = environments.venv_python(tmp_path)
        python.parent.mkdir()
        python.touch()
        assert not environments.is_ready(tmp_path, "abc"), "half built: no stamp"
        write(tmp_path / environments.STAMP_NAME, "abc\n")
        assert environments.is_ready(tmp_path, "abc")
        assert not environments.is_ready(tmp_path, "other")
        python.unlink()
        assert not environments.is_ready(tmp_path, "abc")

    def test_makes_it_once_and_again_after_a_failure(self, tmp_path, monkeypatch):
        requirements = write(tmp_path / "r.txt", "x==1\n")
        folder = tmp_path / "env"
        made = []

        def make(folder: Path, requirements: Path) -> None:
            made.append(folder)
            environments.venv_python(folder).parent.mkdir(parents=True, exist_ok=True)
            environments.venv_python(folder).touch()
            if len(made) == 1:
                raise environments.SetupError("no network")

        monkeypatch.setattr(environments, "_make", make)
        with pytest.raises(environments.SetupError):
            environments.ensure(folder, requirements)
        for _ in range(2):
            assert environments.ensure(folder, requirements) == environments.venv_python(folder)
        assert len(made) == 2
        write(requirements, "x==2\n")
        environments.ensure(folder, requirements)
        assert len(made) == 3

    def test_a_second_start_waits_for_the_first(self, tmp_path):
        order = []

        def second() -> None:
            with environments.locked(tmp_path / "lock"):
                order.append("second")

        with environments.locked(tmp_path / "lock"):
            thread = threading.Thread(target=second)
            thread.start()
            thread.join(0.5)
            order.append("first")
        thread.join(10)
        assert order == ["first", "second"]


class TestResults:
    REPORT = '<testsuites><testsuite tests="10" failures="1" errors="2" skipped="3"/></testsuites>'

    def test_errors_count_as_failed_and_skipped_as_neither(self, tmp_path):
        report = write(tmp_path / "junit.xml", self.REPORT)
        assert checks.read_junit(report) == checks.Counts(passed=4, failed=3)

    @pytest.mark.parametrize("text", [None, "", "<testsuites><test"])
    def test_a_run_without_a_readable_report_is_a_failure(self, tmp_path, text):
        report = tmp_path / "junit.xml"
        if text is not None:
            write(report, text)
        assert checks.read_junit(report) == checks.Counts(failed=1)

    @pytest.mark.parametrize(
        ("failing", "summary", "status"),
        [((), "6 passed, 0 failed", 0), (("ruff",), "6 passed, 0 failed", 1), (("tests",), "4 passed, 2 failed", 1)],
    )
    def test_the_last_line_sums_both_runs(self, tmp_path, monkeypatch, capsys, failing, summary, status):
        one_run = (checks.Counts(2, 1), 1) if "tests" in failing else (checks.Counts(3, 0), 0)
        monkeypatch.setattr(checks, "lint", lambda root: [name for name in failing if name == "ruff"])
        monkeypatch.setattr(checks, "run_pytest", lambda root, part, arguments, **more: one_run)
        assert checks.run(tmp_path, []) == status
        assert capsys.readouterr().out.splitlines()[-1] == summary

    def test_a_run_of_no_tests_fails(self, tmp_path, monkeypatch):
        monkeypatch.setattr(
            checks, "run_pytest", lambda root, part, arguments, **more: (checks.Counts(), checks.PYTEST_NO_TESTS)
        )
        assert checks.run(tmp_path, ["--only", "gradio4"]) == 1

    def test_only_is_ours_and_the_rest_is_pytests(self):
        assert checks.parse([]) == (["lint", "gradio4", "gradio3"], [])
        assert checks.parse(["-k", "x", "--only", "gradio3", "tests/test_a.py", "-x"]) == (
            ["gradio3"],
            ["-k", "x", "tests/test_a.py", "-x"],
        )


class TestChromiumSearch:
    @staticmethod
    def find(environ=None, on_path=(), broken=(), installers=()):
        return chromium.find(
            environ or {},
            lambda name: f"/bin/{name}" if name in on_path else None,
            lambda path: path not in broken,
            [lambda path=path: path for path in installers],
        )

    def test_the_variable_wins(self):
        assert self.find({chromium.VARIABLE: "/my/browser"}, on_path=["chromium"]) == "/my/browser"

    def test_a_wrong_variable_is_told_and_not_passed_over(self):
        with pytest.raises(environments.SetupError, match="/my/browser"):
            self.find({chromium.VARIABLE: "/my/browser"}, on_path=["chromium"], broken=["/my/browser"])

    def test_then_what_is_on_the_path_in_order(self):
        assert self.find(on_path=["google-chrome", "chromium-browser"]) == "/bin/chromium-browser"

    def test_a_stub_on_the_path_is_passed_over(self):
        found = self.find(
            on_path=["chromium-browser", "google-chrome"], broken=["/bin/chromium-browser"], installers=["/new"]
        )
        assert found == "/bin/google-chrome"

    def test_then_the_installers_until_one_brings_a_browser_that_works(self):
        assert self.find(broken=["/b"], installers=[None, "/b", "/c", "/d"]) == "/c"

    def test_none_at_all_says_how_to_name_one(self):
        with pytest.raises(environments.SetupError, match=chromium.VARIABLE):
            self.find(installers=[None])

    @pytest.mark.parametrize(("line", "expected"), [("ID=debian", True), ('ID="debian"', True), ("ID=ubuntu", False)])
    def test_apt_is_for_root_on_debian(self, tmp_path, monkeypatch, line, expected):
        monkeypatch.setattr(chromium.os, "name", "posix")
        monkeypatch.setattr(chromium.os, "geteuid", lambda: 0, raising=False)
        release = write(tmp_path / "os-release", f"NAME=x\n{line}\nID_LIKE=debian\n")
        assert chromium.is_debian_root(release) is expected
        monkeypatch.setattr(chromium.os, "geteuid", lambda: 1000, raising=False)
        assert not chromium.is_debian_root(release)
