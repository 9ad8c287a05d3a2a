"""Captions training pictures and expands prompts."""

from typing import Annotated

from pydantic import Field

from shared.config import default_kind
from shared.prompts.expand import check_known, check_named, expand, names_in, without
from shared.prompts.templates import Templates
from shared.prompts.union_sampling import UnionSampling

Prompts = Annotated[Templates | UnionSampling, Field(discriminator="kind"), default_kind("templates")]

__all__ = ["Prompts", "Templates", "UnionSampling", "check_known", "check_named", "expand", "names_in", "without"]
