"""User code beside a spec neither shadows our modules nor is shadowed by them.

What is imported outlives a test, so everything that could collide runs in a process of its own.
"""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from pipelines.usercode import UserCodeError, check_reference, load_object


def write(root: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text))
    return str(root)


def run(script: str, *arguments: str, cwd: Path | None = None, path: Path | None = None) -> list[object]:
    """The values that a fresh interpreter's script puts into ``shown``, after `from pipelines.usercode import ...`."""
    head = "import json, sys\nfrom pipelines.usercode import *\nshown = []\n"
    foot = "\nprint(json.dumps(shown))\n"
    insert = f"import sys; sys.path.insert(0, {str(path)!r})\n" if path else ""
    code = insert + head + textwrap.dedent(script) + foot
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *arguments], capture_output=True, text=True, cwd=cwd, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    values: list[object] = json.loads(done.stdout)
    return values


def test_a_function_a_class_and_a_nested_attribute(tmp_path: Path) -> None:
    root = write(tmp_path, {"plain_steps.py": "def f(): return 1\nclass C:\n    class D:\n        value = 2\n"})
    assert load_object("plain_steps:f", root)() == 1
    assert load_object("plain_steps:C.D.value", root) == 2
    assert load_object("plain_steps:f", root) is load_object("plain_steps:f", root)


def test_installed_and_standard_modules_are_found_without_a_root() -> None:
    assert load_object("json:loads", "")("[1]") == [1]
    assert load_object("pipelines.duration:parse_duration", "")("5s") == 5.0


def test_two_roots_with_the_same_names_stay_apart(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(
            tmp_path / name,
            {
                "steps.py": "import helpers\nfrom helpers import who as again\ndef f(): return helpers.who, again\n",
                "helpers.py": f"who = {name!r}\n",
            },
        )
    shown = run(
        """
        one, two = sys.argv[1:]
        shown += [load_object("steps:f", one)(), load_object("steps:f", two)(), load_object("steps:f", one)()]
        """,
        str(tmp_path / "one"),
        str(tmp_path / "two"),
    )
    assert shown == [["one"] * 2, ["two"] * 2, ["one"] * 2]


@pytest.mark.parametrize("name", ["pipelines", "cli", "broker", "nodes", "laxity", "cluster", "json", "numpy"])
def test_a_module_with_a_taken_name_is_the_users_for_the_user_and_ours_for_us(tmp_path: Path, name: str) -> None:
    root = write(
        tmp_path,
        {
            f"{name}.py": "who = 'user'\n",
            "steps.py": f"""
                import {name}
                from {name} import who
                def f():
                    import {name} as late
                    return {name}.who, who, late.who
                """,
        },
    )
    shown = run(
        f"""
        root = sys.argv[1]
        shown.append(load_object("steps:f", root)())
        shown.append(load_object("{name}:who", root))
        import importlib, pipelines.load, cli, broker, nodes, laxity.protocol
        shown.append(hasattr(importlib.import_module("{name}"), "who"))
        shown.append(len(pipelines.load.shipped_pipelines()) > 1)
        """,
        root,
    )
    assert shown == [["user"] * 3, "user", False, True]


def test_packages_with_taken_names_relative_imports_and_submodules(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "pipelines/__init__.py": "from .helpers import value\n",
            "pipelines/helpers.py": "value = 'user'\n",
            "pipelines/deep/__init__.py": "",
            "pipelines/deep/far.py": """
                from ..helpers import value
                from . import near
                import pipelines.deep.near
                import pipelines.deep.near as named
                from pipelines.deep import near as again
                def f(): return value, near.value, pipelines.deep.near.value, named is near is again, pipelines.value
                """,
            "pipelines/deep/near.py": "value = 'near'\n",
            "cli.py": """
                from pipelines.helpers import value
                from pipelines.usercode_of_mine import other
                import xml.dom.minidom, os.path as p
                def f(): return value, other, xml.dom.minidom.__name__, p.sep
                """,
            "pipelines/usercode_of_mine.py": "other = 1\n",
        },
    )
    shown = run(
        """
        root = sys.argv[1]
        shown.append(load_object("pipelines.deep.far:f", root)())
        shown.append(load_object("cli:f", root)())
        import pipelines.duration
        shown.append(pipelines.duration.__file__.startswith(root))
        """,
        root,
    )
    assert shown == [["user", "near", "near", True, "user"], ["user", 1, "xml.dom.minidom", "/"], False]


def test_a_plainly_importable_root_still_sees_its_own_modules(tmp_path: Path) -> None:
    """As in a service that starts us from its own directory, after ours were imported."""
    root = write(
        tmp_path,
        {
            "steps.py": "from pipelines.helpers import value\ndef f(): return value, __name__\n",
            "pipelines/__init__.py": "",
            "pipelines/helpers.py": "value = 'user'\n",
        },
    )
    shown = run(
        """
        sys.path.insert(0, sys.argv[1])
        shown.append(load_object("steps:f", sys.argv[1])())
        """,
        root,
    )
    assert shown == [["user", "steps"]]


def test_our_own_modules_are_not_loaded_twice_when_the_root_is_our_checkout() -> None:
    checkout = str(Path(__file__).parent.parent)
    shown = run(
        """
        import pipelines.duration
        shown.append(load_object("pipelines.duration:parse_duration", sys.argv[1]) is pipelines.duration.parse_duration)
        shown.append(load_object("pipelines.fields:Field", sys.argv[1]).__module__)
        """,
        checkout,
    )
    assert shown == [True, "pipelines.fields"]


def test_a_directory_of_data_does_not_hide_an_installed_package(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "numpy/weights.txt": "",
            "os/readme.txt": "",
            "parts/tool.py": "value = 3\n",
            "steps.py": "import numpy, os, parts.tool\ndef f(): return numpy.zeros(1)[0], os.sep, parts.tool.value\n",
        },
    )
    assert run('shown.append(load_object("steps:f", sys.argv[1])())', root) == [[0.0, "/", 3]]


def test_a_built_in_module_stays_as_in_any_python(tmp_path: Path) -> None:
    root = write(tmp_path, {"time.py": "raise RuntimeError\n", "steps.py": "import time\nf = time.monotonic\n"})
    assert run('shown.append(load_object("steps:f", sys.argv[1])() > 0)', root) == [True]


def test_what_is_imported_by_name_at_run_time_goes_by_plain_imports(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "json.py": "",
            "only_here.py": "value = 4\nclass Kept: pass\n",
            "steps.py": """
                import importlib, pickle, only_here
                def f():
                    pickled = type(pickle.loads(pickle.dumps(only_here.Kept())))
                    same = pickled is only_here.Kept
                    plain = importlib.import_module("json")
                    return importlib.import_module("only_here").value, hasattr(plain, "dumps"), same
                """,
        },
    )
    assert run('shown.append(load_object("steps:f", sys.argv[1])())', root) == [[4, True, True]]


def test_a_module_in_which_a_private_class_is_pickled(tmp_path: Path) -> None:
    root = write(tmp_path, {"cli.py": "class Kept: pass\n", "steps.py": "from cli import Kept\n"})
    script = """
        import pickle
        Kept = load_object("steps:Kept", sys.argv[1])
        shown.append(type(pickle.loads(pickle.dumps(Kept()))) is Kept)
        """
    assert run(script, root) == [True]


def test_a_root_reached_by_a_link_is_the_same_root(tmp_path: Path) -> None:
    write(tmp_path / "real", {"cli.py": "class C: pass\n"})
    (tmp_path / "link").symlink_to(tmp_path / "real")
    script = 'shown.append(load_object("cli:C", sys.argv[1]) is load_object("cli:C", sys.argv[2]))'
    assert run(script, str(tmp_path / "real"), str(tmp_path / "link")) == [True]


def test_builtins_are_complete_in_user_code(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {"complete_steps.py": "def f():\n    class A: pass\n    return len([A(), *map(abs, range(3))]), __name__\n"},
    )
    assert load_object("complete_steps:f", root)()[0] == 4


# ---- errors --------------------------------------------------------------------------


def failure(ref: str, root: str) -> str:
    with pytest.raises(UserCodeError) as caught:
        load_object(ref, root)
    assert str(caught.value) == f"{caught.value.message}; {caught.value.advice}"
    return str(caught.value)


def test_a_missing_module_names_where_it_was_looked_for(tmp_path: Path) -> None:
    text = failure("nothing_of_that_name:f", str(tmp_path))
    assert "'nothing_of_that_name:f'" in text
    assert str(tmp_path) in text
    assert "nothing_of_that_name.py beside the spec" in text
    assert "pip install" in failure("nothing_of_that_name:f", "")


def test_a_missing_submodule(tmp_path: Path) -> None:
    root = write(tmp_path, {"some_package/__init__.py": "", "some_module.py": ""})
    assert "no module 'gone'" in failure("some_package.gone:f", root)
    assert str(tmp_path / "some_package") in failure("some_package.gone:f", root)
    assert "has no 'gone' inside" in failure("some_module.gone:f", root)


def test_a_missing_attribute_names_the_file(tmp_path: Path) -> None:
    root = write(tmp_path, {"attribute_steps.py": "class A: pass\n"})
    assert str(tmp_path / "attribute_steps.py") in failure("attribute_steps:g", root)
    assert "'A.b'" in failure("attribute_steps:A.b", root)


@pytest.mark.parametrize("ref", ["steps", "steps:", ":f", "a b:f", "steps:f()", "a..b:f", "..a:f"])
def test_a_malformed_reference(ref: str, tmp_path: Path) -> None:
    assert "package.module:function" in failure(ref, str(tmp_path))


def test_code_that_raises_shows_its_own_line(tmp_path: Path) -> None:
    root = write(tmp_path, {"raising_steps.py": "import json\n\nvalue = json.loads('{')\n"})
    text = failure("raising_steps:f", root)
    assert f"{tmp_path / 'raising_steps.py'}:3 (value = json.loads('{{'))" in text
    assert "JSONDecodeError" in text


def test_an_import_inside_that_is_missing_says_what_to_install(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "importing_steps.py": "from importing_helper import x\n",
            "importing_helper.py": "import not_installed_thing\n",
        },
    )
    text = failure("importing_steps:f", root)
    assert f"{tmp_path / 'importing_helper.py'}:1 (import not_installed_thing)" in text
    assert "pip install not_installed_thing" in text


def test_a_missing_module_of_a_private_package_is_named_as_the_user_wrote_it(tmp_path: Path) -> None:
    root = write(tmp_path, {"cli.py": "import broker.gone\n", "broker/__init__.py": ""})
    text = failure("cli:f", root)
    assert "No module named 'broker.gone'" in text
    assert "_laxity_user" not in text


def test_a_syntax_error_shows_its_line(tmp_path: Path) -> None:
    root = write(tmp_path, {"broken_steps.py": "x = 1\ndef f(:\n"})
    assert f"{tmp_path / 'broken_steps.py'}:2 (def f(:)" in failure("broken_steps:f", root)


def test_code_that_exits_is_an_error_and_not_our_end(tmp_path: Path) -> None:
    root = write(tmp_path, {"exiting_steps.py": "import sys\nsys.exit(3)\n"})
    assert "SystemExit" in failure("exiting_steps:f", root)


def test_a_reference_is_checked_without_running_anything(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {"checked_package/__init__.py": "raise RuntimeError\n", "checked_package/steps.py": "raise RuntimeError\n"},
    )
    check_reference("checked_package.steps:f", root)
    with pytest.raises(UserCodeError, match="no module 'gone'"):
        check_reference("checked_package.gone:f", root)
