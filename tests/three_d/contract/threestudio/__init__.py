"""A stand-in for threestudio with only the API that threestudio's documentation promises to extensions.

This module is the registry that maps names to classes.
"""

import logging

__version__ = "0.0.contract"
__modules__ = {}
info = logging.getLogger("threestudio").info


def register(name):
    def keep(cls):
        if name in __modules__:
            raise ValueError(f"{name} is already registered")
        __modules__[name] = cls
        return cls

    return keep


def find(name):
    return __modules__[name]
