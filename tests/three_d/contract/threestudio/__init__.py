"""Stands in for threestudio, but provides only the API that its documentation promises to extensions.

This module is the registry of classes by name.
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
