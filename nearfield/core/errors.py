"""Errors that say what was given, what is allowed and what to do."""

from importlib import import_module
from types import ModuleType


class BackendUnavailable(RuntimeError):
    """A backend asked for by name cannot run here."""


class MissingPackage(ImportError):
    """An optional package is absent; the message holds the exact install command."""


def require(module: str, *, extra: str = "", package: str = "") -> ModuleType:
    """The imported module, or `MissingPackage` with the command that installs it.

    `extra` names one of nearfield's extras; `package` a distribution that no extra carries.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise  # the module is there; something that it needs is not
        wanted = package or f"'nearfield[{extra}]'"
        name = module.partition(".")[0]
        raise MissingPackage(f"This needs the package {name}: pip install {wanted}") from None
