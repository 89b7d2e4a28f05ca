"""Which files a pipeline needs, what a record of them may say, and the cache in which they lie."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path, PurePosixPath

import pytest

from cluster.filecache import CacheError, CacheFull, FileCache, WrongContent, default_directory
from pipelines import ModelNotFoundError, SpecError, load_spec, parse_spec
from pipelines.files import (
    MAX_BYTES,
    MAX_FILES,
    FileRecord,
    FilesError,
    addresses,
    check_files,
    describe,
    files_of_stage,
    needed_paths,
    place_of,
    with_files_at,
)

TWO = """
name: two
slo: 1s
stages:
  a: {executor: onnx, model: models/a.onnx, before: steps:before, sample: steps:sample}
  b: {executor: onnx, model: ./b.onnx, after: kit.post:after, inputs: [a]}
output: b
"""


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def two(root: Path, *lines: str):
    write(
        root,
        {
            "two.yaml": TWO + "\n".join(lines),
            "models/a.onnx": "model a",
            "b.onnx": "model b",
            "steps.py": "import json\nimport helpers\n",
            "helpers.py": "def f():\n    from lazy.inner import g\n",
            "lazy/inner.py": "",
            "kit/__init__.py": "",
            "kit/post.py": "from . import other\nfrom numpy import array\n",
            "kit/other.py": "",
            "kit/data.json": "{}",
            "unused.py": "",
            "json.py": "import unused_too\n",
            "unused_too.py": "",
        },
    )
    return load_spec(str(root / "two.yaml"))


# ---- which -----------------------------------------------------------------------------------------


def test_models_the_code_that_stages_name_and_what_it_imports(tmp_path):
    assert needed_paths(two(tmp_path)) == [
        "b.onnx",
        "helpers.py",
        "json.py",  # in a root's code an import means the root's own first
        "kit/__init__.py",
        "kit/other.py",
        "kit/post.py",
        "lazy/inner.py",
        "models/a.onnx",
        "steps.py",
        "unused_too.py",
    ]


def test_listed_files_are_added_and_must_be_there(tmp_path):
    spec = two(tmp_path, "files: ['kit/**/*.json', unused.py]")
    assert {"kit/data.json", "unused.py"} <= set(needed_paths(spec))
    with pytest.raises(SpecError, match=r"'gone.txt' matches no file below .*; correct it or remove it"):
        two(tmp_path, "files: [gone.txt]")
    with pytest.raises(SpecError, match=r"matches no file .*; write 'kit/\*\*/\*' for all that is in it"):
        two(tmp_path, "files: [kit]")


@pytest.mark.parametrize("pattern", ["../x", "/etc/passwd", "a/../../x", "", ".", "a**b"])
def test_patterns_stay_below_the_root(tmp_path, pattern):
    with pytest.raises(SpecError, match="files"):
        two(tmp_path, f"files: ['{pattern}']")


def test_shipped_pipelines_need_no_files():
    assert needed_paths(load_spec("ocr")) == []
    assert describe(load_spec("lv"))[1] == []


@pytest.mark.parametrize(
    "model", ["../outside.onnx", "sub/../../outside.onnx", pytest.param("{}/outside.onnx", id="absolute")]
)
def test_a_model_outside_of_the_root_cannot_be_given_away(tmp_path, model):
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "outside.onnx").write_text("")
    text = f"name: x\nslo: 1s\nstages: {{a: {{executor: onnx, model: {model.format(tmp_path)}}}}}\noutput: a\n"
    (root / "x.yaml").write_text(text)
    with pytest.raises(FilesError, match=r"lies outside of the spec's directory .*; move the model there, or write"):
        needed_paths(load_spec(str(root / "x.yaml")))


@pytest.mark.parametrize("link", ["models/a.onnx", "helpers.py", "models"])
def test_links_are_refused(tmp_path, link):
    spec = two(tmp_path)
    path = tmp_path / link
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FilesError, match=r"is a symbolic link, .*; put the file itself there"):
        needed_paths(spec)


def test_a_model_that_vanished_is_missed(tmp_path):
    spec = two(tmp_path)
    (tmp_path / "b.onnx").unlink()
    with pytest.raises(ModelNotFoundError, match=r"no file .*b\.onnx"):
        needed_paths(spec)


def test_too_many_files(tmp_path):
    (tmp_path / "many").mkdir()
    for number in range(MAX_FILES):
        (tmp_path / "many" / str(number)).touch()
    spec = two(tmp_path, "files: ['many/*']")
    with pytest.raises(FilesError, match=rf"needs {MAX_FILES + 10} files .* at most {MAX_FILES}"):
        needed_paths(spec)


def test_a_changed_file_makes_a_new_version_and_another_place_does_not(tmp_path):
    first, files = describe(two(tmp_path / "here"))
    assert [file for file in files if file.path == "b.onnx"] == [FileRecord("b.onnx", digest(b"model b"), 7)]
    moved, _ = describe(two(tmp_path / "there"))
    assert moved.root != first.root
    assert moved.version == first.version
    (tmp_path / "there" / "b.onnx").write_text("MODEL B")
    changed, _ = describe(moved)
    assert changed.version != first.version
    assert two(tmp_path / "here").version != two(tmp_path / "there").version  # not applied: the place is what is known


def test_the_content_is_nothing_to_be_written(tmp_path):
    with pytest.raises(SpecError, match="content is found out by itself; remove it"):
        two(tmp_path, "content: abc")


def test_a_stage_needs_no_other_stages_models(tmp_path):
    spec, files = describe(two(tmp_path))
    assert {file.path for file in files} - {file.path for file in files_of_stage(spec, "a", files)} == {"b.onnx"}
    assert {file.path for file in files} - {file.path for file in files_of_stage(spec, "b", files)} == {"models/a.onnx"}


# ---- models at addresses ----------------------------------------------------------------------------


def at_address(model: str, *fields: str, executor: str = "onnx"):
    text = f"name: x\nslo: 1s\nstages: {{a: {{executor: {executor}, model: '{model}'{''.join(fields)}}}}}\noutput: a\n"
    return parse_spec(text, file="x.yaml", root="/nowhere")


def test_a_model_at_an_address_with_and_without_a_digest():
    assert addresses(at_address("https://host/a.onnx")) == {"https://host/a.onnx": None}
    spec = at_address("http://[::1]:80/a.pt2?x=1#y", f", sha256: {'a' * 64}", executor="torch")
    assert addresses(spec) == {"http://[::1]:80/a.pt2?x=1#y": "a" * 64}
    file = FileRecord("http://[::1]:80/a.pt2?x=1#y", "0" * 64, 5)
    described, files = describe(spec, [file])
    assert files == [file]
    assert described.root == ""  # nothing is needed from there
    assert place_of(file).suffix == ".pt2"
    placed = with_files_at(described, "/r", Path("/tree"), files)
    assert (placed.root, placed.stages["a"].model) == ("/r", str(Path("/tree") / place_of(file)))


@pytest.mark.parametrize(
    "model", ["http://", "https:///x.onnx", "http://user:secret@host/x.onnx", "http://host/ü.onnx"]
)
def test_what_is_no_address(model):
    with pytest.raises(SpecError, match="is no address"):
        at_address(model)


def test_digests_go_with_addresses_only(tmp_path):
    (tmp_path / "a.onnx").touch()
    with pytest.raises(SpecError, match="sha256 goes with a model at an address"):
        at_address(str(tmp_path / "a.onnx"), f", sha256: {'a' * 64}")
    with pytest.raises(SpecError, match="sha256"):
        at_address("http://host/a.onnx", ", sha256: abc")


@pytest.mark.parametrize(
    "url", ["http://h/..", "http://h/%2e%2e%2fx", "http://h/", "http://h/a/%00%0a.onnx", "http://h/.x"]
)
def test_where_a_file_from_an_address_is_laid_out_is_no_matter_of_the_address(url):
    place = place_of(FileRecord(url, "0" * 64, 1))
    assert len(place.parts) == 3
    assert ".." not in place.parts
    assert all(part.isprintable() and "/" not in part for part in place.parts)


# ---- what a record says -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "../x",
        "/etc/x",
        "a/../../x",
        "a/./b",
        "a//b",
        "",
        ".",
        "a/",
        "a\0b",
        "a\nb",
        ".laxity/x",
        "x" * 2000,
        "..",
        "a/..",
    ],
)
def test_paths_that_lead_anywhere_else_are_refused(path):
    with pytest.raises(FilesError, match="apply the pipeline again"):
        check_files([FileRecord(path, "0" * 64, 1)])


@pytest.mark.parametrize(
    "files",
    [
        [FileRecord("a", "../../x", 1)],
        [FileRecord("a", "A" * 64, 1)],
        [FileRecord("a", "0" * 64, -1)],
        [FileRecord("a", "0" * 64, MAX_BYTES + 1)],
        [FileRecord("a", "0" * 64, 1), FileRecord("a", "1" * 64, 1)],
        [FileRecord("a", "0" * 64, 1), FileRecord("a/b/c", "1" * 64, 1)],
        [FileRecord(str(number), "0" * 64, 1) for number in range(MAX_FILES + 1)],
    ],
)
def test_records_that_cannot_be_laid_out_are_refused(files):
    with pytest.raises(FilesError):
        check_files(files)


# ---- the cache ---------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path):
    cache = FileCache(tmp_path / "cache", 1000)
    yield cache
    cache.close()


def put(cache: FileCache, content: bytes) -> str:
    cache.add(digest(content), len(content), [content])
    return digest(content)


def remains(cache: FileCache) -> list[str]:
    """What was begun and is still there."""
    return [path.name for path in (cache.directory / "new").iterdir()]


def test_a_file_is_there_once_it_was_checked(cache):
    content = b"abcdef"
    assert not cache.has(digest(content), 6)
    assert cache.read(digest(content), 0, 10) is None
    with cache.writer(digest(content), 6) as writer:
        writer.write(b"abc")
        assert not cache.has(digest(content), 6)
        writer.write(b"def")
        writer.commit()
    assert cache.has(digest(content), 6)
    assert cache.read(digest(content), 2, 3) == (6, b"cde")
    assert cache.read(digest(content), 6, 3) == (6, b"")
    assert put(cache, b"")
    assert remains(cache) == []


@pytest.mark.parametrize("chunks", [[b"abcdeX"], [b"abc"], [b"abcdef", b"g"], []])
def test_wrong_truncated_and_overlong_content_leaves_nothing(cache, chunks):
    with pytest.raises(WrongContent):
        cache.add(digest(b"abcdef"), 6, chunks)
    assert not cache.has(digest(b"abcdef"), 6)
    assert remains(cache) == []


def test_a_source_that_breaks_off_leaves_nothing(cache):
    def chunks():
        yield b"abc"
        raise ConnectionError

    with pytest.raises(ConnectionError):
        cache.add(digest(b"abcdef"), 6, chunks())
    assert remains(cache) == []


def test_digests_that_are_none_never_become_paths(cache):
    for wrong in ("../x", "", "A" * 64, "0" * 63):
        with pytest.raises(CacheError, match="no SHA-256 digest"):
            cache.read(wrong, 0, 1)
        with pytest.raises(CacheError, match="no SHA-256 digest"):
            cache.writer(wrong, 1)


def test_the_least_recently_used_goes_first_and_what_is_held_stays(cache):
    first, second, third = [put(cache, bytes([number]) * 300) for number in range(3)]
    cache.hold([second])
    cache.hold([first])  # used later than the others, and second is no longer held
    fourth = put(cache, b"4" * 300)
    assert [cache.has(each, 300) for each in (first, second, third, fourth)] == [True, True, False, True]
    cache.hold([first, second, fourth])
    with pytest.raises(CacheFull, match="900 of at most 1000 bytes, all in use, and 300 more are needed"):
        put(cache, b"5" * 300)
    assert remains(cache) == []
    cache.hold([first])
    put(cache, b"5" * 300)
    assert cache.has(first, 300)


def test_what_is_larger_than_the_cache_does_not_fit(cache):
    with pytest.raises(CacheFull, match="0 of at most 1000 bytes"):
        cache.writer("0" * 64, MAX_BYTES)


def test_room_is_reserved_while_a_file_is_written(cache):
    with cache.writer("0" * 64, 600), pytest.raises(CacheFull):
        cache.writer("1" * 64, 600)
    cache.writer("1" * 64, 600).close()


def test_another_caches_holds_count_and_end_with_it(cache):
    other = FileCache(cache.directory, 1000)
    held = put(cache, b"a" * 600)
    other.hold([held])
    with pytest.raises(CacheFull):
        put(cache, b"b" * 600)
    other.close()
    put(cache, b"b" * 600)
    assert not cache.has(held, 600)


def test_what_a_killed_process_held_and_began_is_free(cache):
    held = put(cache, b"a" * 600)
    code = (
        "import os, sys, pathlib; from cluster.filecache import FileCache\n"
        "cache = FileCache(pathlib.Path(sys.argv[1]), 1000); cache.hold([sys.argv[2]])\n"
        "writer = cache.writer('0' * 64, 300); print('there', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, cache.directory, held], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"there\n"
    with pytest.raises(CacheFull):
        put(cache, b"b" * 600)
    process.kill()
    process.communicate()
    put(cache, b"b" * 600)
    assert remains(cache) == []
    assert list((cache.directory / "held").iterdir()) == []


def test_a_full_disk_is_told_and_leaves_nothing(cache):
    put(cache, b"a" * 100)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        with pytest.raises(CacheError, match=f"cannot be used: {os.strerror(errno.EFBIG)}.*--cache"):
            put(cache, b"b" * 600)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert remains(cache) == []
    assert cache.has(digest(b"a" * 100), 100)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_full_file_system_first_loses_what_nobody_holds(tmp_path):
    mounted = tmp_path / "small"
    mounted.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", mounted], check=False, capture_output=True
    ).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        cache = FileCache(mounted / "cache")
        first, second = put(cache, b"a" * 400_000), put(cache, b"b" * 400_000)
        cache.hold([second])
        third = put(cache, b"c" * 400_000)
        assert [cache.has(each, 400_000) for each in (first, second, third)] == [False, True, True]
        cache.hold([second, third])
        with pytest.raises(CacheFull, match=r"no space left on the disk of .* for 400000 bytes: make room there"):
            put(cache, b"d" * 400_000)
        assert remains(cache) == []
        cache.close()
    finally:
        subprocess.run(["umount", mounted], check=True)


def test_a_directory_that_cannot_be_used_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CacheError, match=r"cannot be used: Not a directory; .*--cache"):
        put(FileCache(tmp_path / "file" / "cache"), b"a")


def test_a_damaged_file_is_found_and_removed(cache):
    good, bad = put(cache, b"good"), put(cache, b"bad!")
    file = cache.directory / "files" / bad
    file.chmod(0o600)
    file.write_bytes(b"Bad!")
    assert cache.check(good, 4)
    assert not cache.check(bad, 4)
    assert not cache.has(bad, 4)
    assert put(cache, b"bad!") == bad
    assert cache.check(bad, 4)


def test_a_tree_has_the_files_at_their_paths_and_goes_when_nobody_holds_it(cache):
    one, two = put(cache, b"one"), put(cache, b"two")
    places = [(PurePosixPath("a/one.py"), one), (PurePosixPath("two.onnx"), two), (PurePosixPath("again"), one)]
    name = cache.tree_of(places)
    cache.hold([one, two], [name])
    tree = cache.lay_out(places)
    assert (tree / "a" / "one.py").read_bytes() == b"one"
    assert (tree / "again").samefile(tree / "a" / "one.py")
    assert cache.lay_out(places) == tree
    big = put(cache, b"x" * 990)
    assert tree.is_dir()
    cache.hold([big])
    with pytest.raises(CacheFull):
        put(cache, b"y" * 990)
    assert not tree.exists()
    assert not cache.has(one, 3)


def test_a_tree_is_mended_after_its_file_was_damaged(cache):
    one = put(cache, b"one")
    places = [(PurePosixPath("one.py"), one)]
    tree = cache.lay_out(places)
    (tree / "one.py").chmod(0o600)
    (tree / "one.py").write_bytes(b"two")
    assert not cache.check(one, 3)
    put(cache, b"one")
    assert (cache.lay_out(places) / "one.py").read_bytes() == b"one"


def test_many_threads_share_a_cache(cache):
    contents = [bytes([number]) * 90 for number in range(10)]
    failures = []

    def work():
        try:
            for content in contents:
                if not cache.check(digest(content), 90):
                    put(cache, content)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [error for error in failures if not isinstance(error, CacheFull)] == []
    assert remains(cache) == []


def test_the_default_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_directory() == tmp_path / "laxity"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_directory() == tmp_path / "home" / ".cache" / "laxity"
