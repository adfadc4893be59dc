"""Run folders: what exists is complete, what fails leaves nothing, and one run at a time writes a folder."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from compress import canonical, store
from compress.errors import DiskError, LockedError, UsageError
from compress.manifest import NAME, Manifest, describe_files

HOLDER = """
import sys, time
from pathlib import Path
from compress import store
with store.staged(Path(sys.argv[1]), True):
    print("held", flush=True)
    time.sleep(60)
"""


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def run(out: Path, text: str, *, force: bool = False) -> None:
    with store.staged(out, force) as stage:
        store.write_file(stage / "model", text)
        manifest = Manifest(describe_files(stage), {}, {}, [], 0, "", {})
        store.write_file(stage / NAME, canonical.dumps(manifest))
        store.publish(stage, out)


def start_holder(out: Path) -> subprocess.Popen[str]:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(out)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    return holder


def test_a_published_folder_holds_its_files_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    run(tmp_path / "out", "new")
    assert (tmp_path / "out" / "model").read_text() == "new"
    assert names(tmp_path) == {"out"}
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755


def test_an_existing_folder_needs_force(tmp_path: Path) -> None:
    run(tmp_path / "out", "old")
    with pytest.raises(UsageError, match="already exists") as caught:
        run(tmp_path / "out", "new")
    assert "--force" in caught.value.hint
    assert (tmp_path / "out" / "model").read_text() == "old"


def test_force_exchanges_the_whole_folder(tmp_path: Path) -> None:
    with store.staged(tmp_path / "out", False) as stage:
        for name in ("model", "extra"):
            store.write_file(stage / name, "of the old run")
        store.write_file(stage / NAME, canonical.dumps(Manifest(describe_files(stage), {}, {}, [], 0, "", {})))
        store.publish(stage, tmp_path / "out")
    run(tmp_path / "out", "new", force=True)
    assert (tmp_path / "out" / "model").read_text() == "new"
    assert names(tmp_path / "out") == {"model", NAME}
    assert names(tmp_path) == {"out"}


def test_force_never_replaces_what_no_run_wrote(tmp_path: Path) -> None:
    run(tmp_path / "out", "old")
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "data.npz").write_text("precious")
    for name, foreign in (("out", "thesis.tex"), ("other", "data.npz")):
        with pytest.raises(UsageError, match=f"{foreign}, which no run of hcompress wrote") as caught:
            run(tmp_path / name, "new", force=True)
        assert "move your own files" in caught.value.hint
        assert (tmp_path / name / foreign).read_text() == "precious"
    (tmp_path / "empty").mkdir()
    run(tmp_path / "empty", "new", force=True)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_error_before_publishing_leaves_the_old_folder_and_nothing_else(
    tmp_path: Path, error: type[BaseException]
) -> None:
    run(tmp_path / "out", "old")
    with pytest.raises(error), store.staged(tmp_path / "out", True) as stage:
        store.write_file(stage / "model", "half")
        raise error
    assert (tmp_path / "out" / "model").read_text() == "old"
    assert names(tmp_path) == {"out"}


def test_stages_of_killed_runs_are_removed_and_others_are_not(tmp_path: Path) -> None:
    (tmp_path / ".out.partial-dead").mkdir()
    (tmp_path / ".out.partial-dead" / "model").write_text("half")
    (tmp_path / ".other.partial-alive").mkdir()
    run(tmp_path / "out", "new")
    assert names(tmp_path) == {"out", ".other.partial-alive"}


def test_a_name_with_brackets_is_no_pattern(tmp_path: Path) -> None:
    (tmp_path / ".a.partial-alive").mkdir()
    run(tmp_path / "[ab]", "new")
    assert names(tmp_path) == {"[ab]", ".a.partial-alive"}


def test_a_second_process_is_refused_at_once_and_a_killed_one_blocks_nobody(tmp_path: Path) -> None:
    out = tmp_path / "out"
    holder = start_holder(out)
    try:
        start = time.monotonic()
        with pytest.raises(LockedError, match="another run writes this folder"):
            run(out, "second")
        assert time.monotonic() - start < 5
    finally:
        holder.kill()
        holder.wait()
    run(out, "third")
    assert (out / "model").read_text() == "third"
    assert names(tmp_path) == {"out"}


def test_missing_parents_are_made_and_taken_away_again_on_failure(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b" / "out"
    with pytest.raises(KeyboardInterrupt), store.staged(out, False):
        raise KeyboardInterrupt
    assert names(tmp_path) == set()
    run(out, "new")
    assert (out / "model").read_text() == "new"


def test_a_file_as_out_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UsageError, match="already exists"):
        store.check_target(tmp_path / "out", False)
    with pytest.raises(UsageError, match="is a file") as caught:
        store.check_target(tmp_path / "out", True)
    assert "names a folder" in caught.value.hint


def test_a_file_as_parent_is_a_disk_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="is not a folder"):
        run(tmp_path / "file" / "deep" / "out", "new")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_parent_is_a_disk_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(DiskError, match="can't be written"):
        run(tmp_path / "out", "new")


def test_an_overlong_name_is_a_disk_error(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="can't be written") as caught:
        run(tmp_path / ("x" * 300), "new")
    assert "shorter" in caught.value.hint
    with pytest.raises(DiskError):
        run(tmp_path / ("x" * 250), "new")  # the folder's name fits, its lock's doesn't
    assert names(tmp_path) == set()


def test_a_loop_of_links_is_a_disk_error(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "out")
    with pytest.raises((DiskError, UsageError)):
        store.check_target(tmp_path / "out", True)


def test_a_link_stands_for_its_folder(tmp_path: Path) -> None:
    run(tmp_path / "real", "old")
    (tmp_path / "latest").symlink_to(tmp_path / "real")
    with pytest.raises(UsageError, match="already exists"):
        run(tmp_path / "latest", "new")
    run(tmp_path / "latest", "new", force=True)
    assert (tmp_path / "latest").is_symlink()
    assert (tmp_path / "real" / "model").read_text() == "new"
    assert names(tmp_path) == {"real", "latest"}


def test_the_current_folder_and_inputs_are_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    run(tmp_path / "run", "new")
    with pytest.raises(UsageError, match=r"model: replacing it would remove that too"):
        store.check_target(tmp_path / "run", True, [tmp_path / "run" / "model"])
    store.check_target(tmp_path / "run", True)
    monkeypatch.chdir(tmp_path / "work")
    for out in (Path(), tmp_path / "work"):
        with pytest.raises(UsageError, match="would remove that too"):
            store.check_target(out, True)
    monkeypatch.setenv("HOME", str(tmp_path / "work"))
    monkeypatch.chdir("/")
    with pytest.raises(UsageError, match="would remove that too"):
        store.check_target(tmp_path / "work", True)


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_while_writing_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write_file(tmp_path / "file", "old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskError, match="No space left") as caught:
        store.write_file(tmp_path / "file", "new")
    assert "free space" in caught.value.hint
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == {"file"}


def test_a_full_disk_while_publishing_keeps_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "out", "old")
    with pytest.raises(DiskError, match="No space left"), store.staged(tmp_path / "out", True) as stage:
        store.write_file(stage / "model", "new")
        monkeypatch.setattr(os, "fsync", full)
        store.publish(stage, tmp_path / "out")
    assert (tmp_path / "out" / "model").read_text() == "old"
    assert names(tmp_path) == {"out"}


def test_a_full_disk_while_staging_is_a_disk_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store.tempfile, "mkdtemp", lambda **_: full())
    with pytest.raises(DiskError, match="No space left"):
        run(tmp_path / "out", "new")
    assert names(tmp_path) == set()


def test_a_folder_that_cannot_be_synced_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync = os.fsync

    def refuse_folders(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").resolve().is_dir():
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    run(tmp_path / "out", "new")
    assert (tmp_path / "out" / "model").read_text() == "new"


def test_writing_below_a_file_is_a_disk_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="can't be written"):
        store.write_file(tmp_path / "file" / "inner", "x")


class _WithoutExchange:
    """A C library of a system without renameat2."""


@pytest.fixture
def no_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: _WithoutExchange())


@pytest.mark.usefixtures("no_exchange")
def test_without_an_exchange_two_renames_do_it(tmp_path: Path) -> None:
    run(tmp_path / "out", "old")
    run(tmp_path / "out", "new", force=True)
    assert (tmp_path / "out" / "model").read_text() == "new"
    assert names(tmp_path) == {"out"}


@pytest.mark.usefixtures("no_exchange")
@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_without_an_exchange_a_failure_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    run(tmp_path / "out", "old")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if ".partial-" in self.name and not self.name.endswith(store.SET_ASIDE):
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises((DiskError, KeyboardInterrupt)):
        run(tmp_path / "out", "new", force=True)
    assert (tmp_path / "out" / "model").read_text() == "old"
    assert names(tmp_path) == {"out"}


def test_a_run_killed_between_two_renames_loses_nothing(tmp_path: Path) -> None:
    run(tmp_path / "out", "old")
    (tmp_path / "out").rename(tmp_path / f".out.partial-dead{store.SET_ASIDE}")
    with pytest.raises(UsageError, match="already exists"):
        run(tmp_path / "out", "new")
    assert (tmp_path / "out" / "model").read_text() == "old"
    run(tmp_path / "out", "new", force=True)
    assert (tmp_path / "out" / "model").read_text() == "new"


def test_an_exchange_that_the_system_refuses_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "out", "old")

    class Refusing:
        @staticmethod
        def renameat2(*_: object) -> int:
            ctypes.set_errno(errno.EACCES)
            return -1

    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: Refusing())
    with pytest.raises(DiskError, match="Permission denied"):
        run(tmp_path / "out", "new", force=True)
    assert (tmp_path / "out" / "model").read_text() == "old"
