"""A merge method as a recipe names it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field


class AverageSpec(BaseModel):
    """A merge method and its parameters; which parameters exist is the method's business."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    method: Annotated[str, Field(description="Name of a merge method; `mediator methods` lists them.")] = "linear"
    preset: Annotated[str | None, Field(description="Named defaults of the method, such as `mergekit`.")] = None

    @property
    def params(self) -> dict[str, Any]:
        """The method's own parameters as written."""
        return dict(self.model_extra or {})

    @property
    def names_method(self) -> bool:
        """Whether the method was written; in an override, parameters alone change those of the method that applies."""
        return "method" in self.model_fields_set

    def check_change(self) -> None:
        """Raise ValueError if this, as a change of what applies already, changes nothing or leaves open what it is."""
        if self.names_method:
            return
        if self.preset is not None:
            raise ValueError("a preset replaces all parameters of its method; name the method too")
        if not self.params:
            raise ValueError("average sets nothing; give a method or parameters")
