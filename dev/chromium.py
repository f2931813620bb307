"""Find a Chromium for the browser tests, or install one."""

import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

from dev.environments import SetupError

VARIABLE = "HYPERMERGE_CHROMIUM"
NAMES = ("chromium", "chromium-browser", "google-chrome")
INSTALL_LIMIT_S = 600


def find(
    environ: Mapping[str, str],
    which: Callable[[str], str | None],
    works: Callable[[str], bool],
    installers: list[Callable[[], str | None]],
) -> str:
    """Return a working Chromium's path: the variable's, one on PATH, else the first installer's.

    A browser named by the variable is the only one tried: a typing error there
    is better told than passed over.
    """
    named = environ.get(VARIABLE)
    if named:
        if not works(named):
            raise SetupError(f"{VARIABLE} names {named}, which does not start")
        return named
    for found in map(which, NAMES):
        # Some distributions' chromium-browser only says to install something else.
        if found and works(found):
            return found
    for install in installers:
        installed = install()
        if installed and works(installed):
            return installed
    raise SetupError(
        f"no Chromium found for the browser tests: install one, or set {VARIABLE} to the path of a Chromium or Chrome"
    )


def find_here(python: Path) -> str:
    """Find or install a Chromium on this machine; python is one that has playwright."""
    # On a Debian with the right to install, its package comes first: it brings
    # the shared libraries, which playwright's download leaves out, and it works
    # where only package registries are reached.
    installers = [
        lambda: playwright_browser(python),
        install_with_apt,
        lambda: install_with_playwright(python),
    ]
    return find(os.environ, shutil.which, works, installers)


def works(path: str) -> bool:
    """Tell whether a browser starts at all."""
    if os.name == "nt":
        # There `chrome --version` opens a window instead.
        return Path(path).is_file()
    try:
        command = [path, "--no-sandbox", "--version"]
        return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def playwright_browser(python: Path) -> str | None:
    """Return the Chromium that playwright downloaded earlier, if it did."""
    code = (
        "from playwright.sync_api import sync_playwright\n"
        "with sync_playwright() as p: print(p.chromium.executable_path)"
    )
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False)
    path = done.stdout.strip()
    return path if path and Path(path).is_file() else None


def install_with_playwright(python: Path) -> str | None:
    """Let playwright download its Chromium, and return its path."""
    _try([str(python), "-m", "playwright", "install", "chromium"])
    return playwright_browser(python)


def install_with_apt() -> str | None:
    """Install Debian's Chromium if this is a Debian and we are root, and return its path."""
    if not is_debian_root():
        return None
    _try(["apt-get", "update", "-q"])
    _try(["apt-get", "install", "-y", "-q", "chromium"])
    return shutil.which("chromium")


def is_debian_root(os_release: Path = Path("/etc/os-release")) -> bool:
    """Tell whether apt may install chromium here.

    Ubuntu's package of that name is a hint to a snap, hence Debian alone.
    """
    if os.name != "posix" or os.geteuid() != 0 or not os_release.is_file():
        return False
    lines = os_release.read_text(encoding="utf-8").splitlines()
    return "ID=debian" in (line.replace('"', "") for line in lines)


def _try(command: list[str]) -> None:
    """Run an installer whose failure only means that the next one is tried."""
    print("$", " ".join(command), flush=True)
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        subprocess.run(command, env=env, stdin=subprocess.DEVNULL, timeout=INSTALL_LIMIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        print(error, flush=True)
