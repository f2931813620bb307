"""The work folder: what was saved is there after a kill, whole or not at all, for the same job alone."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from killing import die, killed
from models import ROOT, listing

from lib_hypermerge.errors import BusyError, OutputError
from lib_hypermerge.files.together import publish_together
from lib_hypermerge.files.unnamed import TextWriter
from lib_hypermerge.jobs.hyper import work as module
from lib_hypermerge.jobs.hyper.work import Work, mend, work_folder

TENSORS = {
    "cores": torch.randn(3, 4, 5), "basis": torch.randn(2, 7).bfloat16(), "half": torch.randn(6, 2).half().t(),
    "gram": torch.randn(3, 3, dtype=torch.float64), "centre": torch.tensor(1.5, dtype=torch.float64),
    "empty": torch.zeros(0, 4),
}  # fmt: skip
JOB = {"models": ["a", "b"], "ranks": "8,4"}


@pytest.fixture
def folder(tmp_path):
    return work_folder(tmp_path / "family.safetensors")


def assert_same(found):
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor), name


def test_what_was_saved_comes_back_and_outlives_the_process(folder):
    with Work.open(folder, JOB) as work:
        assert not work.resumed and not work.has(0) and work.bytes == 0
        work.save(0, TENSORS)
        work.save(7, {"x": torch.ones(3)})
        assert work.has(0) and work.has(7) and not work.has(1)
        assert_same(work.load(0))
        with pytest.raises(KeyError):
            work.load(1)
        used = work.bytes
        assert used == sum((folder / f"0000{i}.safetensors").stat().st_size for i in (0, 7))
    with Work.open(folder, dict(reversed(JOB.items()))) as work:
        assert work.resumed and work.bytes == used
        assert work.has(0) and work.has(7) and not work.has(1)
        assert_same(work.load(0))


def test_saving_again_replaces(folder):
    with Work.open(folder, JOB) as work:
        work.save(0, TENSORS)
        work.save(0, {"x": torch.ones(3)})
        assert torch.equal(work.load(0)["x"], torch.ones(3))
        assert work.bytes == (folder / "00000.safetensors").stat().st_size


@pytest.mark.parametrize("other", ["job", "version"])
def test_another_job_or_version_begins_anew(folder, other, monkeypatch):
    with Work.open(folder, JOB) as work:
        work.save(0, TENSORS)
    if other == "version":
        monkeypatch.setattr(module, "__version__", "99.0")
    with Work.open(folder, JOB | ({"ranks": "4"} if other == "job" else {})) as work:
        assert not work.resumed and not work.has(0) and work.bytes == 0
        assert {path.name for path in folder.iterdir()} == {"lock", "job.json"}


def test_discarding_leaves_nothing(folder):
    with Work.open(folder, "a text does too") as work:
        work.save(0, TENSORS)
        work.discard()
    assert list(folder.parent.iterdir()) == []


@pytest.mark.parametrize("used", [False, True])
def test_folders_above_go_as_well_if_nothing_is_in_them(tmp_path, used):
    with Work.open(work_folder(tmp_path / "new" / "folder" / "x.safetensors"), JOB) as work:
        if used:
            (tmp_path / "new" / "output").touch()
        work.discard()
    assert [path.name for path in tmp_path.rglob("*")] == (["new", "output"] if used else [])


@pytest.mark.parametrize("damage", ["shorter", "longer", "zeros", "one bit", "empty"])
def test_a_torn_file_is_as_good_as_none(folder, damage):
    with Work.open(folder, JOB) as work:
        work.save(0, TENSORS)
        work.save(1, TENSORS)
    path = folder / "00000.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "shorter":
        del content[-10:]
    elif damage == "longer":
        content += b"\0" * 8
    elif damage == "zeros":
        content[-40:] = b"\0" * 40
    elif damage == "one bit":
        content[-1] ^= 1
    else:
        content.clear()
    path.write_bytes(content)
    with Work.open(folder, JOB) as work:
        assert not work.has(0) and work.has(1)
        work.save(0, TENSORS)
        assert work.has(0)
        assert_same(work.load(0))
        path.write_bytes(content)
        with pytest.raises(OutputError, match="damaged"):
            work.load(0)


def test_one_run_at_a_time(folder):
    with Work.open(folder, JOB) as work:
        work.save(0, TENSORS)
        with pytest.raises(BusyError, match="at work"):
            Work.open(folder, JOB | {"ranks": "4"})
        assert work.has(0) and (folder / "00000.safetensors").exists()
    Work.open(folder, JOB).close()


def test_threads_save_at_once(folder):
    with Work.open(folder, JOB) as work, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: work.save(i, {"x": torch.full((1000,), float(i))}), range(40)))
        assert all(float(work.load(i)["x"].sum()) == 1000 * i for i in range(40))
        assert work.bytes == sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def test_a_full_disk_is_told(folder, monkeypatch):
    with Work.open(folder, JOB) as work:

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(module, "_write", full)
        with pytest.raises(OutputError, match="No space"):
            work.save(0, TENSORS)
        assert not work.has(0)


def test_folders_that_nobody_used_for_a_week_go(folder, tmp_path):
    stale, busy, fresh = (tmp_path / f".{name}.hypermerge-work" for name in ("stale", "busy", "fresh"))
    held = Work.open(busy, JOB)
    for path in (stale, fresh):
        with Work.open(path, JOB) as work:
            work.save(0, TENSORS)
    long_ago = time.time() - 8 * 24 * 3600
    for path in (stale, busy):
        os.utime(path, (long_ago, long_ago))
    Work.open(folder, JOB).close()
    assert {path.name for path in tmp_path.iterdir()} == {busy.name, fresh.name, folder.name}
    held.close()


def test_long_names_have_a_folder(tmp_path):
    with Work.open(work_folder(tmp_path / ("名" * 80 + ".safetensors")), JOB) as work:
        work.save(0, TENSORS)
        work.discard()
    assert list(tmp_path.iterdir()) == []


# --- kills ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [0, 2, 5, 31])
def test_a_kill_while_saving_leaves_what_was_whole(folder, pieces):
    write, left = module._write, [pieces]  # noqa: SLF001 - where the process is to end

    def dying(file, view):
        for start in range(0, len(view), 1000):
            write(file, view[start : start + 1000])
            if left[0] == 0:
                die()
            left[0] -= 1

    def save():
        module._write = dying  # noqa: SLF001
        with Work.open(folder, "job") as work:
            for i in range(10):
                work.save(i, {"x": torch.full((1000,), float(i))})  # length, header, four thousand bytes

    assert killed(save)
    assert any(path.suffix == ".part" for path in folder.iterdir())
    with Work.open(folder, "job") as work:
        whole = [i for i in range(10) if work.has(i)]
        assert whole == list(range(pieces // 6))
        assert work.resumed == bool(whole)
        assert all(torch.equal(work.load(i)["x"], torch.full((1000,), float(i))) for i in whole)
        assert not any(path.suffix == ".part" for path in folder.iterdir())


def test_another_process_is_kept_out_until_it_dies(folder):
    code = "import sys; from pathlib import Path; from lib_hypermerge.jobs.hyper.work import Work\n"
    code += "work = Work.open(Path(sys.argv[1]), 'job'); print('open', flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "open\n"
    with pytest.raises(BusyError):
        Work.open(folder, "job")
    process.kill()
    process.communicate(timeout=60)
    Work.open(folder, "job").close()


@pytest.mark.parametrize("kill_at", [0, 1, 2, 3])
def test_mending_after_a_kill_between_the_outputs(folder, tmp_path, kill_at):
    target, publish, count = tmp_path / "out", TextWriter.publish, [0]
    target.mkdir()
    (target / "b.txt").write_text("old")

    def dying(self):
        if self.path.parent == target:
            if count[0] == kill_at:
                die()
            count[0] += 1
        return publish(self)

    def work_on():
        TextWriter.publish = dying
        with Work.open(folder, "job") as work:
            files = [TextWriter(target / f"{name}.txt", "new", overwrite=True) for name in "abc"]
            for file in files:
                file.seal()
            publish_together(files, work.journal)
            die()

    assert killed(work_on)
    mend(folder)
    if kill_at < 3:
        assert listing(target) == {"b.txt": b"old"}
        assert folder.exists()
    else:
        assert listing(target) == dict.fromkeys(("a.txt", "b.txt", "c.txt"), b"new")
    mend(folder)
    mend(tmp_path / "nothing")


def test_nobody_mends_what_is_being_published(folder, tmp_path):
    with Work.open(folder, JOB) as work, TextWriter(tmp_path / "a.txt", "new") as a:
        a.seal()
        publish_together([a], work.journal)
        work.journal.write_text('{"outputs": []}')
        mend(folder)
        assert work.journal.exists()
