"""Stands in for threestudio, with only what its documentation promises to extensions: a registry of classes by name."""

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
