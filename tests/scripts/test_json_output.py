"""Result files appear whole or not at all."""

import errno
import json
import os

import pytest
from json_output import check_output_path, write_json


def test_an_earlier_file_is_replaced(tmp_path):
    path = check_output_path(str(tmp_path / "out.json"))
    for content in ({"a": 1}, {"b": [2.5]}):
        write_json(path, content)
        assert json.loads(path.read_text()) == content
    assert os.listdir(tmp_path) == ["out.json"]


def test_a_full_disk_leaves_the_earlier_file(tmp_path, monkeypatch):
    path = tmp_path / "out.json"
    path.write_text("earlier")

    def fail(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=r"cannot write the 14 bytes of .*out\.json: No space left on device"):
        write_json(path, {"a": 12})
    assert path.read_text() == "earlier"
    assert os.listdir(tmp_path) == ["out.json"]


def test_what_is_no_file_is_refused(tmp_path):
    for path in (tmp_path, "/dev/null"):
        with pytest.raises(FileExistsError, match="it is there, and no file"):
            check_output_path(str(path))
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        check_output_path(str(tmp_path / "missing" / "out.json"))


def test_a_link_is_followed(tmp_path):
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    write_json(check_output_path(str(tmp_path / "link.json")), 1)
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "real.json").read_text() == "1\n"
