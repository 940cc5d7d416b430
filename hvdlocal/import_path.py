"""Objects that a configuration names by import path, "package.module:name": finding them, calling them, and their mistakes.

Nothing is imported that a configuration does not name in this way. The working directory is searched last, so that a file in it
never takes the place of an installed module that something else imports.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import site
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

_PATH = re.compile(r"([^\W\d]\w*(?:\.[^\W\d]\w*)*):([^\W\d]\w*(?:\.[^\W\d]\w*)*)")
_OWN_FILES = str(Path(__file__).parent)
_INSTALLED = tuple(
    {*site.getsitepackages(), site.getusersitepackages(), sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")}
)


class OwnCodeError(ValueError):
    """A user's code cannot be imported or called, or raised an error; the message is one sentence about it."""


def is_import_path(name: str) -> bool:
    """Returns whether a name is meant as an import path, right or wrong: a colon marks it."""
    return ":" in name


def load(path: str, setting: str) -> Any:
    """Imports the object that an import path names.

    Args:
        path: such as "package.module:name"; the module lies in the working directory or is installed.
        setting: the setting that holds the path, for messages.

    Raises:
        OwnCodeError: the path is malformed, there is no such module or object, or the module raises an error.
    """
    match = _PATH.fullmatch(path)
    if match is None:
        raise OwnCodeError(f"{setting}={path}: write an import path as package.module:name")
    module_name, attributes = match.groups()
    found: Any = _module(module_name, path, setting)
    for attribute in attributes.split("."):
        if not hasattr(found, attribute):
            names = [name for name in dir(found) if not name.startswith("_")]
            near = difflib.get_close_matches(attribute, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(names[:8]) or 'no names'}"
            raise OwnCodeError(f"{setting}={path}: {_place(found, module_name)} has no {attribute!r}; {hint}")
        found = getattr(found, attribute)
    return found


def call(path: str, setting: str, *positional: Any, arguments: Mapping[str, Any]) -> Any:
    """Calls the function or class that an import path names.

    Args:
        path, setting: as for `load`.
        positional: the first arguments of the call.
        arguments: the other arguments, by name: those of the configuration.

    Raises:
        OwnCodeError: the object cannot be called in this way, or raises an error.
    """
    function = load(path, setting)
    check_arguments(function, path, setting, *positional, arguments=arguments)
    with own_code(f"{setting}={path}"):
        return function(*positional, **arguments)


def check_arguments(function: Any, path: str, setting: str, *positional: Any, arguments: Mapping[str, Any]) -> None:
    """Checks that a function or class takes these arguments, without calling it.

    Raises:
        OwnCodeError: it does not; the message has its signature.
    """
    if not callable(function):
        raise OwnCodeError(f"{setting}={path}: this is {_article(type(function).__name__)}; name a function or a class")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some functions written in C have none
        return
    try:
        signature.bind(*positional, **arguments)
    except TypeError as error:
        name = path.rpartition(":")[2]
        raise OwnCodeError(f"{setting}={path}: {error}; its arguments are {name}{_short(signature)}") from error


def accepts(function: Callable[..., Any], name: str) -> bool:
    """Returns whether a function or class takes an argument of this name."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(parameter.name == name or parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


@contextmanager
def own_code(what: str) -> Iterator[None]:
    """Turns every error of a user's code inside the context into one sentence with the line where it happened.

    Args:
        what: the setting and the name of the code, for the message.

    Raises:
        OwnCodeError: the code raised an error or left by `sys.exit`. Running out of memory is raised as it is.
    """
    try:
        yield
    except (MemoryError, KeyboardInterrupt, GeneratorExit, OwnCodeError):
        raise
    except BaseException as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which this module does not import
            raise
        raise OwnCodeError(f"{what}: {describe_error(error)}") from error


def describe_error(error: BaseException) -> str:
    """Returns an error as one sentence: its type, its message, and the last line of the user's own code that led to it."""
    try:
        text = " ".join(str(error).split())
    except Exception:
        text = ""
    if len(text) > 300:
        text = text[:300] + " …"
    if isinstance(error, SystemExit):
        text, kind = f"with code {error.code}", "it left the program by sys.exit"
    else:
        kind = type(error).__name__
    said = f"{kind}: {text}" if text else kind
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, SyntaxError) and error.filename:
        return f"{said.partition(' (')[0]} (in {_shown(error.filename)}, line {error.lineno})"
    own = [frame for frame in frames if _is_own(frame.filename)]
    others = [frame for frame in frames if not frame.filename.startswith((_OWN_FILES, "<frozen"))]
    for frame in reversed(own or others):
        line = f": {frame.line}" if frame.line else ""
        return f"{said} (in {_shown(frame.filename)}, line {frame.lineno}, {frame.name}{line})"
    return said


def code_digests(paths: Mapping[str, str]) -> dict[str, str]:
    """Returns digests of the source files behind import paths, by which ranks and starts of a run compare their code.

    Of each path these are its module and all loaded modules in the same directory or below it, such as those that it imports.
    Installed packages are left out.

    Args:
        paths: the import paths, by the settings that hold them; they have been loaded.
    """
    modules: set[str] = set()
    for path in paths.values():
        named = sys.modules.get(path.partition(":")[0])
        file = getattr(named, "__file__", None)
        if named is None or file is None or not _is_own(file):
            continue
        levels = named.__name__.count(".") + hasattr(named, "__path__")
        root = str(Path(file).parents[levels])
        modules |= {name for name, one in list(sys.modules.items()) if _is_beneath(one, root)}
    found = {}
    for name in sorted(modules):
        file = getattr(sys.modules[name], "__file__", None)
        if file is not None and Path(file).is_file():
            found[name] = hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
    return found


def _module(name: str, path: str, setting: str) -> ModuleType:
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
        importlib.invalidate_caches()
    _refuse_shadow(name.partition(".")[0], here, path, setting)
    try:
        with own_code(f"{setting}={path}"):
            return importlib.import_module(name)
    except OwnCodeError as error:
        missing = error.__cause__
        if isinstance(missing, ModuleNotFoundError) and missing.name and f"{name}.".startswith(f"{missing.name}."):
            raise OwnCodeError(
                f"{setting}={path}: there is no module {missing.name!r} in the working directory ({here}) or among the "
                "installed packages"
            ) from missing
        raise


def _refuse_shadow(package: str, here: str, path: str, setting: str) -> None:
    """Refuses a module of the working directory that cannot be imported since another module has its name."""
    if package == __name__.partition(".")[0]:  # hvdlocal's own code, started in a clone of another version
        return
    places = [Path(here, f"{package}.py"), Path(here, package)]
    mine = [place for place in places if place.is_file() or any(place.glob("*.py"))]
    if not mine:
        return
    loaded = sys.modules.get(package)
    specification = loaded.__spec__ if loaded is not None else importlib.util.find_spec(package)
    origin = None if specification is None else specification.origin
    if specification is None or (origin is None and loaded is None):
        return
    if origin is None or Path(origin).resolve() not in {
        place.resolve() for one in mine for place in (one, one / "__init__.py")
    }:
        raise OwnCodeError(
            f"{setting}={path}: {mine[0]} has the name of another module ({origin or 'built in'}), which is found first; "
            "rename your file"
        )


def _is_own(file: str) -> bool:
    """Returns whether a file is the user's own code: neither installed, nor of Python, nor of hvdlocal."""
    return bool(file) and not file.startswith((_OWN_FILES, "<", *_INSTALLED))


def _is_beneath(module: Any, root: str) -> bool:
    """Returns whether a module is the user's own and lies in a directory or below it."""
    file = getattr(module, "__file__", None)
    return isinstance(file, str) and file.startswith(root + os.sep) and _is_own(file)


def _shown(file: str) -> str:
    here = os.getcwd()
    return os.path.relpath(file, here) if file.startswith(here + os.sep) else file


def _place(found: Any, module: str) -> str:
    return f"the module {module}" if isinstance(found, ModuleType) else getattr(found, "__name__", repr(found))


def _short(signature: inspect.Signature) -> str:
    """Returns a signature without the types, which may be long."""
    bare = [parameter.replace(annotation=parameter.empty) for parameter in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=signature.empty))


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0].lower() in "aeiou" else f"a {noun}"
