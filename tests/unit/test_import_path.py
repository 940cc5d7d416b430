"""Objects by import path, and the sentences about a user's mistakes."""

import sys

import pytest

from hvdlocal.import_path import OwnCodeError, accepts, call, code_digests, is_import_path, load

CODE = """
class Net:
    def __init__(self, width, depth=2):
        self.width = width

class Outer:
    class Inner:
        pass

def raises():
    return helper()

def helper():
    return {}["missing"]

def leaves():
    raise SystemExit(3)

number = 7
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with modules of its own, which are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    (tmp_path / "mine_here.py").write_text(CODE)
    (tmp_path / "broken_here.py").write_text("import no_such_module_here\n")
    (tmp_path / "torn_here.py").write_text("def f(:\n")
    (tmp_path / "raising_here.py").write_text("x = 1\nx / 0\n")
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0].endswith("_here")]:
        del sys.modules[name]


def test_from_the_working_directory_and_from_installed_packages(here):
    assert load("mine_here:Net", "model.name")(3).width == 3
    assert load("mine_here:Outer.Inner", "model.name").__name__ == "Inner"
    assert load("collections:OrderedDict", "model.name").__name__ == "OrderedDict"
    assert call("mine_here:Net", "model.name", arguments={"width": 5}).width == 5
    assert sys.path[-1] == str(here), "searched last"
    assert is_import_path("a:b")
    assert not is_import_path("resnet9")


def test_a_file_never_takes_the_place_of_an_installed_module(here):
    """`json.py` in the working directory is neither imported for somebody else nor silently left out."""
    (here / "colorsys.py").write_text("mine = True\n")
    load("mine_here:Net", "task")
    import colorsys

    assert not hasattr(colorsys, "mine")
    with pytest.raises(
        OwnCodeError, match=r"colorsys.py has the name of another module \(.*\), which is found first; rename"
    ):
        load("colorsys:mine", "task")


def test_hvdlocals_own_code_beside_a_clone_of_hvdlocal(here):
    """An installed hvdlocal is started in a clone of another one: what it names itself is its own."""
    (here / "hvdlocal").mkdir()
    (here / "hvdlocal/__init__.py").write_text("")
    assert load("hvdlocal.exit_codes:ExitCode", "task").FINISHED == 0


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("mine_here", r"model.name=mine_here: write an import path as package.module:name"),
        ("mine_here:", r"write an import path as package.module:name"),
        ("../mine_here:Net", r"write an import path as package.module:name"),
        ("mine_here:Nte", r"the module mine_here has no 'Nte'; did you mean 'Net'\?"),
        (
            "nowhere_here:Net",
            r"there is no module 'nowhere_here' in the working directory \(.*\) or among the installed",
        ),
        (
            "broken_here:Net",
            r"ModuleNotFoundError: No module named 'no_such_module_here' \(in broken_here.py, line 1, <module>",
        ),
        ("torn_here:f", r"SyntaxError: .* \(in torn_here.py, line 1\)"),
        ("raising_here:x", r"ZeroDivisionError: division by zero \(in raising_here.py, line 2, <module>: x / 0\)"),
    ],
)
def test_what_cannot_be_loaded(here, path, sentence):
    with pytest.raises(OwnCodeError, match=sentence):
        load(path, "model.name")


@pytest.mark.parametrize(
    ("name", "arguments", "sentence"),
    [
        ("Net", {}, r"missing a required argument: 'width'; its arguments are Net\(width, depth=2\)"),
        ("Net", {"widht": 3}, r"'widht'.*its arguments are Net\(width, depth=2\)|missing a required argument: 'width'"),
        (
            "Net",
            {"width": 1, "heads": 3},
            r"got an unexpected keyword argument 'heads'; its arguments are Net\(width, depth=2\)",
        ),
        ("number", {}, r"this is an int; name a function or a class"),
        ("raises", {}, r"KeyError: 'missing' \(in mine_here.py, line 14, helper: return \{\}\[\"missing\"\]\)"),
        ("leaves", {}, r"it left the program by sys.exit: with code 3 \(in mine_here.py, line 17, leaves"),
    ],
)
def test_what_cannot_be_called(here, name, arguments, sentence):
    with pytest.raises(OwnCodeError, match=sentence):
        call(f"mine_here:{name}", "model.name", arguments=arguments)


def test_running_out_of_memory_is_no_mistake_of_the_code(here):
    (here / "large_here.py").write_text("def f():\n    raise MemoryError('much')\n")
    with pytest.raises(MemoryError):
        call("large_here:f", "task", arguments={})


def test_which_arguments_a_function_accepts():
    assert accepts(lambda num_classes: 0, "num_classes")
    assert accepts(lambda **others: 0, "num_classes")
    assert not accepts(lambda x: 0, "num_classes")


def test_digests_change_with_the_code_of_a_package(here):
    package = here / "package_here"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "blocks.py").write_text("value = 1\n")
    (package / "net.py").write_text("from package_here.blocks import value\n")
    assert load("package_here.net:value", "task") == 1
    before = code_digests({"task": "package_here.net:value"})
    assert set(before) == {"package_here", "package_here.blocks", "package_here.net"}
    (here / "beside_here.py").write_text("value = 1\n")
    (here / "net_here.py").write_text("from beside_here import value\n")
    load("net_here:value", "task")
    assert {"net_here", "beside_here"} <= set(code_digests({"task": "net_here:value"})), "what it imports, too"
    (package / "blocks.py").write_text("value = 2\n")
    after = code_digests({"task": "package_here.net:value"})
    assert {name for name in before if before[name] != after[name]} == {"package_here.blocks"}
