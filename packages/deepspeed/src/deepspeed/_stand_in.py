"""What stands for a name that is not provided: it can be imported, and raises when it is used."""

from __future__ import annotations

from typing import Any, NoReturn

from deepspeed._errors import NotProvidedError


class _NotProvidedType(type):
    """The class of classes that stand for what is not there: nothing is an instance of one."""

    reason: str

    def __call__(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotProvidedError(cls.reason)

    def __getattr__(cls, name: str) -> NoReturn:
        # What inspection asks of every object is not use.
        if name.startswith("__"):
            raise AttributeError(name)
        raise NotProvidedError(cls.reason)


def not_provided(name: str, instead: str) -> type:
    """A stand-in for `name`: to call it, subclass it or read it raises NotProvidedError."""

    def refuse(cls: type, **kwargs: Any) -> NoReturn:
        raise NotProvidedError(reason)

    reason = f"{name} is not provided by this package; {instead}"
    home, _, own = name.rpartition(".")
    body = {
        "reason": reason,
        "__init_subclass__": classmethod(refuse),
        "__doc__": reason,
        "__module__": home,
    }
    return _NotProvidedType(own, (), body)


def is_stand_in(value: object) -> bool:
    """Whether this stands for a name that is not provided."""
    return isinstance(value, _NotProvidedType)
