"""Errors of the operating system, really made: said in words, with the path and a remedy."""

import errno
import os
import resource

import pytest

from bltjax.cli import one_line
from bltjax.runtime.system_errors import FAULTS, in_words


def error_of(function, *arguments):
    with pytest.raises(OSError) as error:
        function(*arguments)
    return error.value


def test_faults_of_paths(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for path, words in {
        "missing": "is not there: check the path",
        "": "is a directory: give a file",
        "file/below": "leads through a file that is no directory",
        "circle": "is a link that leads back to itself",
        "x" * 300: "is too long a name: choose a shorter path",
    }.items():
        error = error_of(open, tmp_path / path)
        assert in_words(error).startswith(str(tmp_path / path)[:300]) and words in in_words(error)
        assert one_line(error) == f"error: {in_words(error)}"
        assert one_line(f"cannot do it: {error}").count("Errno") == 0
    error = error_of(os.rename, tmp_path / "missing", tmp_path / "there")
    assert str(tmp_path / "missing") in in_words(error) and str(tmp_path / "there") in in_words(
        error
    )
    error = error_of(os.mkdir, tmp_path / "file")
    assert in_words(error).endswith("exists: choose another path, or delete it")


def test_too_many_open_files(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        error = error_of(os.open, tmp_path / "x", os.O_CREAT)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "too many files are open: raise the limit (ulimit -n)" in in_words(error)


def test_a_full_disk_and_a_closed_input():
    with open("/dev/full", "wb", buffering=0) as full:
        error = error_of(full.write, b"x")
    assert in_words(error, "out.html") == (
        "out.html cannot be written, no space is left there: free some disk space"
    )
    assert in_words(error_of(os.read, 9999, 1)) == "standard input is closed"


def test_no_number_is_left():
    for number in errno.errorcode:
        error = OSError(number, os.strerror(number), "some/path")
        assert "some/path" in in_words(error) and "Errno" not in one_line(error)
        if number not in FAULTS:
            assert os.strerror(number) in in_words(error)


def test_messages_of_libraries_and_of_ours_stay():
    assert in_words(FileExistsError("x is in the way: move it")) == "x is in the way: move it"
    assert in_words(OSError(errno.ENOENT, "no such bucket", "gs://x")) == "gs://x: no such bucket"
    assert in_words(ValueError("read: [Errno 2] No such file: 'x'")) == "read: No such file: 'x'"
    assert one_line(KeyError("the name")) == "error: the name"
