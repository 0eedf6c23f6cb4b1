"""The base of every config section, ds-core's own and those of other packages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import (
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationInfo,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from ds_core._values import coerce, shown


class Section(BaseModel):
    """One object of the config: unknown keys and loose types are errors, and it never changes.

    A package derives its section from this class and registers it as an entry point of group
    `ds_core.config` whose name is the top-level key. Fields carry the JSON's names, a default, and
    a `description` that says what the value does, or why it makes no difference here.

    Types are strict ("2" is not 2, true is not 1), with two allowances that JSON needs: a float
    with an integral value (5e8) is an integer, and a list is a tuple.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    #: Keys that DeepSpeed has or had and this section has not: what to do instead of each.
    removed: ClassVar[Mapping[str, str]] = {}

    @field_validator("*", mode="before")
    @classmethod
    def _from_json(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields[info.field_name or ""]
        if value == "auto" and takes_auto(field):
            return field.get_default(call_default_factory=True)
        try:
            return coerce(value, field.annotation)
        except TypeError:
            raise PydanticCustomError("wrong_type", "wrong type") from None


class Auto:
    """Annotates a field of which "auto" means its default: one that changes speed, not results.

    A field whose "auto" means more than that has the literal in its type instead.
    """

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {"anyOf": [handler(schema), {"const": "auto"}]}


def takes_auto(field: FieldInfo) -> bool:
    """Whether "auto" stands for the field's default."""
    return any(isinstance(entry, Auto) for entry in field.metadata)


class Only:
    """Annotates a field of which only some values are honoured; the others are refused by name.

    Args:
        allowed: the honoured values.
        because: why the others are not, and what to do instead.
    """

    def __init__(self, *allowed: Any, because: str) -> None:
        self.allowed = allowed
        self.because = because

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {**handler(schema), "enum": list(self.allowed)}

    def _check(self, value: Any) -> Any:
        if value in self.allowed:
            return value
        choices = ", ".join(shown(choice) for choice in self.allowed)
        expected = f"one of {choices}" if len(self.allowed) > 1 else choices
        raise refusal(f"got {shown(value)}, expected {expected}: {self.because}")


def refusal(message: str) -> PydanticCustomError:
    """The error to raise in a validator whose message reaches the user word for word."""
    return PydanticCustomError("refused", "{message}", {"message": message})
