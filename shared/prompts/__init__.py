"""How training pictures are captioned and prompts are expanded."""

from shared.prompts.expand import check_named, expand, names_in, without
from shared.prompts.templates import Templates

Prompts = Templates

__all__ = ["Prompts", "Templates", "check_named", "expand", "names_in", "without"]
