"""Run by the WebUI at every launch. Installs nothing: says in one line what is missing or too old."""

import importlib.metadata as metadata
import re
import sys

NEEDED = {"torch": (2, 1), "numpy": (1, 26), "gradio": (3, 41), "matplotlib": (3, 5)}


def version_of(package):
    """The installed version as numbers, None if it is not installed."""
    try:
        return tuple(int(part) for part in re.findall(r"\d+", metadata.version(package))[:2])
    except metadata.PackageNotFoundError:
        return None


def complaints():
    """What stands in the way, in words; empty if nothing does."""
    found = []
    if sys.version_info < (3, 10):  # noqa: UP036 - the host chooses the Python, not we
        found.append(f"Python 3.10 or newer (this is {sys.version_info[0]}.{sys.version_info[1]})")
    for package, least in NEEDED.items():
        version = version_of(package)
        if version is None or version < least:
            wanted = ".".join(map(str, least))
            has = "missing" if version is None else "this is " + ".".join(map(str, version))
            found.append(f"{package} {wanted} or newer ({has})")
    return found


if __name__ == "__main__":
    missing = complaints()
    if missing:
        print("Hypermerge needs " + ", ".join(missing) + "; it installs nothing by itself.")
