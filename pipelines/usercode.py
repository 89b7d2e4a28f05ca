"""Loads the objects that a spec names: 'package.module:attribute'.

User code lies beside its spec, under whatever names its author chose: ``steps.py`` in two specs' directories, a
``pipelines`` package, a ``json.py``. None of them may shadow, or be shadowed by, our modules, the standard
library's or another spec's. So:

- A spec's directory (its *root*) is looked into by plain imports, but last: what is found anywhere else wins there.
- A reference, and any import statement in code that lies in the root, means the root's own module first.
- Where the root's module is the one that a plain import finds, it is loaded under its plain name. Where a plain
  import would give another module, the root's is loaded under a private package name, one for each root.

Import statements in a root's code are directed by that code's own ``__import__``; other modules (ours, installed ones)
are not affected. What is imported by name at run time (``importlib.import_module``, pickles) goes by plain imports.
"""

from __future__ import annotations

import builtins
import hashlib
import importlib
import re
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from pipelines.packages import find_top_level, install_advice

_PRIVATE = "_laxity_user_"


class UserCodeError(Exception):
    """A reference to user code cannot be loaded; the text says what was looked for, where, and what to do."""

    def __init__(self, message: str, advice: str) -> None:
        super().__init__(f"{message}; {advice}")
        self.message = message
        self.advice = advice


def load_object(ref: str, root: str) -> Any:
    """The object that ``ref`` ('package.module:attribute.attribute') names, ``root`` being the spec's directory ('' if
    it has none).

    Raises :class:`UserCodeError` where the module or attribute does not exist, or the code raises when it is imported.
    """
    module_name, attributes = _split(ref)
    resolved = _checked(ref, module_name, root)
    try:
        module = importlib.import_module(resolved)
    except (Exception, SystemExit) as error:
        raise _raised(ref, error, root) from error
    value: Any = module
    for attribute in attributes:
        if not hasattr(value, attribute):
            where = getattr(module, "__file__", None) or module_name
            raise UserCodeError(
                f"{ref!r}: {where} has no {'.'.join(attributes)!r}", "define it there, or correct the reference"
            )
        value = getattr(value, attribute)
    return value


def check_reference(ref: str, root: str) -> None:
    """Check that the module of ``ref`` exists, importing nothing. Raises :class:`UserCodeError`."""
    _checked(ref, _split(ref)[0], root)


def _split(ref: str) -> tuple[str, list[str]]:
    module, _, attribute = ref.partition(":")
    parts = [*module.split("."), *attribute.split(".")]
    if not all(part.isidentifier() for part in parts):
        raise UserCodeError(f"{ref!r} names no object", "write 'package.module:function'")
    return module, attribute.split(".")


def _checked(ref: str, module: str, root: str) -> str:
    """The name under which to import the module, after checking that it is there."""
    resolved = _root_of(root).resolve(module) if root else module
    top, *rest = module.split(".")
    found = find_top_level(top) if resolved == module else _find_in(top, root)
    if found is None:
        beside = f" in {root} and" if root else ""
        raise UserCodeError(
            f"{ref!r}: no module {top!r}, looked for{beside} among the installed packages",
            f"put {top}.py beside the spec, or {install_advice(top)}",
        )
    for part in rest:
        if found.submodule_search_locations is None:
            raise UserCodeError(
                f"{ref!r}: {found.origin} is a module and has no {part!r} inside", "correct the reference"
            )
        locations = list(found.submodule_search_locations)
        found = PathFinder.find_spec(f"{found.name}.{part}", locations)
        if found is None:
            raise UserCodeError(
                f"{ref!r}: no module {part!r}, looked for in {', '.join(locations)}",
                "add it there, or correct the reference",
            )
    return resolved


def _raised(ref: str, error: BaseException, root: str) -> UserCodeError:
    """The error for code that raised when it was imported, pointing at the user's own line."""
    place, line = "", ""
    if isinstance(error, SyntaxError) and error.filename:
        place, line = f"{error.filename}:{error.lineno}", (error.text or "").strip()
    else:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if root and _within(frame.filename, root)]
        outside = [frame for frame in frames if not frame.filename.startswith("<") and frame.filename != __file__]
        for frame in (own or outside)[-1:]:
            place, line = f"{frame.filename}:{frame.lineno}", frame.line or ""
    advice = "mend it there"
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith(_PRIVATE):
        advice = install_advice(error.name.partition(".")[0])
    shown = f" at {place} ({line})" if line else f" at {place}" if place else ""
    what = re.sub(_PRIVATE + r"\w+\.", "", f"{type(error).__name__}: {error}")
    return UserCodeError(f"{ref!r} cannot be imported{shown}: {what}", advice)


def _within(file: str, root: str) -> bool:
    return Path(file).resolve().is_relative_to(Path(root).resolve())


def _find_in(top: str, root: str) -> ModuleSpec | None:
    return PathFinder.find_spec(top, [str(Path(root).resolve())])


def _identity(spec: ModuleSpec) -> str:
    """The file of a module, or the (first) directory of a namespace package."""
    place = spec.origin or next(iter(spec.submodule_search_locations or ()), None)
    return str(Path(place).resolve()) if place else spec.name


class _Root:
    """One spec's directory: which names are its own, and how they are imported."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.package = _PRIVATE + hashlib.sha256(directory.encode()).hexdigest()[:12]
        self.builtins: dict[str, Any] = {**vars(builtins), "__import__": self._import}
        self._names: dict[str, bool] = {}

    def resolve(self, module: str) -> str:
        """The name under which code of this root imports ``module``: its own, or one in the private package."""
        top = module.partition(".")[0]
        private = self._names.get(top)
        if private is None:
            private = self._names[top] = self._is_private(top)
        return f"{self.package}.{module}" if private else module

    def _is_private(self, top: str) -> bool:
        if top in sys.builtin_module_names or top.startswith(_PRIVATE):
            return False
        own = _find_in(top, self.directory)
        if own is None:
            return False
        plain = find_top_level(top)
        if plain is not None and _identity(plain) == _identity(own):
            if top not in sys.modules:
                _finder.claim(top, self)
            return False
        # A directory of that name without code in it (data, models) takes nothing away from an installed package.
        return own.origin is not None or plain is None or plain.origin is None

    def _import(
        self,
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        resolved = self.resolve(name) if level == 0 else name
        module = builtins.__import__(resolved, globals, locals, fromlist or (), level)
        if resolved == name or fromlist:
            return module
        top = name.partition(".")[0]  # `import a.b` binds a
        return sys.modules[f"{self.package}.{top}"]


class _UserLoader(SourceFileLoader):
    """Runs a module's code with its root's ``__import__``."""

    def __init__(self, name: str, path: str, root: _Root) -> None:
        super().__init__(name, path)
        self._root = root

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__builtins__"] = self._root.builtins
        super().exec_module(module)


class _UserCodeFinder:
    """Finds the modules that belong to a root, as the usual finders do, and has them loaded by its loader."""

    def __init__(self) -> None:
        self._owners: dict[str, _Root] = {}

    def claim(self, top: str, root: _Root) -> None:
        """From now on, the top-level module ``top`` and what is inside belongs to the root."""
        self._owners[top] = root

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        owner = self._owners.get(fullname.partition(".")[0])
        if owner is None:
            return None
        for finder in sys.meta_path:
            found = None if finder is self else finder.find_spec(fullname, path, target)
            if found is not None:
                return _directed(found, owner)
        return None


class _LastFinder:
    """Looks into the roots for what no other finder has. (An entry at the end of ``sys.path`` would come before the
    finders of packages that are installed in editable mode.)"""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if path is not None:
            return None
        for root in list(_roots.values()):
            found = _find_in(fullname, root.directory)
            if found is not None:
                _finder.claim(fullname, root)
                return _directed(found, root)
        return None


def _directed(found: ModuleSpec, root: _Root) -> ModuleSpec:
    """The spec, with the root's loader if it is source code."""
    if type(found.loader) is SourceFileLoader:
        found.loader = _UserLoader(found.loader.name, found.loader.path, root)
    return found


# Imports are a matter of the whole process, so these are the only state here that outlives a call.
_finder = _UserCodeFinder()
_roots: dict[str, _Root] = {}
_lock = threading.Lock()


def _root_of(directory: str) -> _Root:
    directory = str(Path(directory).resolve())
    with _lock:
        root = _roots.get(directory)
        if root is None:
            root = _roots[directory] = _Root(directory)
            package = ModuleType(root.package, f"The user code in {directory}.")
            package.__path__ = [directory]
            package.__spec__ = ModuleSpec(root.package, None, is_package=True)
            package.__spec__.submodule_search_locations = [directory]
            sys.modules[root.package] = package
            _finder.claim(root.package, root)
            if _finder not in sys.meta_path:
                sys.meta_path.insert(0, _finder)
                sys.meta_path.append(_LastFinder())
    return root
