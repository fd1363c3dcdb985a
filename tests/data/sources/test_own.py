"""A kind of one's own: docs/data.md's reads a database whose tables are no files."""

import pathlib
import re
import sqlite3
import sys

import pytest

from ldm_scaling import config
from ldm_scaling.data import sources
from ldm_scaling.errors import UserError
from tests.data.sources import made

PAGE = pathlib.Path(__file__).parents[3] / "docs" / "data.md"


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """The page's code as a plugin; its kind is gone afterwards."""
    found = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (code,) = [block for block in found if "NOT_FILES" in block]
    path = tmp_path / "plugin_my_db.py"
    path.write_text(code)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sources, "KINDS", dict(sources.KINDS))
    monkeypatch.setattr(sources, "NOT_FILES", set(sources.NOT_FILES))
    monkeypatch.setenv("PICTURES_DB", str(tmp_path / "pictures.db"))
    yield str(path)
    sys.modules.pop(path.stem, None)


def test_the_page_s_kind_reads_tables_of_a_database(tmp_path, plugin):
    with sqlite3.connect(tmp_path / "pictures.db") as db:
        db.execute("create table flowers (id integer primary key, image blob, caption text)")
        db.executemany("insert into flowers values (?, ?, ?)",
                       [(i, made.image(i), f"flower {i}") for i in (0, 1, 5, 7)])
    db.close()
    source = f"folder:{tmp_path},my_db:flowers"
    data = config.parse({"plugins": [plugin], "data": {"source": source}}).data
    assert data.sources == (f"folder:{tmp_path}", "my_db:flowers")
    pairs = made.read("my_db:flowers", part_size=3)
    assert [(p.key, p.captions) for p in pairs] == [
        (str(i), (f"flower {i}",)) for i in (0, 1, 5, 7)]
    assert [p.image for p in pairs] == [made.image(i) for i in (0, 1, 5, 7)]
    with pytest.raises(UserError, match="my_db:trees: .*no such table"):
        made.read("my_db:trees")


def test_a_kind_that_lies_on_disk_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "KINDS", sources.KINDS | {"mine2": lambda *given: given})
    with pytest.raises(UserError, match="there is no /nowhere"):
        sources.collection("mine2:/nowhere")
    name, path, options = sources.collection(f"mine2:{tmp_path}")
    assert (name, path, options) == (f"mine2:{tmp_path}", tmp_path, sources.Options())


@pytest.mark.parametrize("source", ["My:x", "2my:x", "my-db:x", "my_db:"])
def test_a_kind_that_is_spelt_otherwise_is_told_how(source):
    with pytest.raises(UserError, match="a kind is lower-case letters, digits and _"):
        config.parse({"data": {"source": source}})
