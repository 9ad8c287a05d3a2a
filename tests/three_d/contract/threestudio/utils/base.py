"""Base classes whose constructors take a mapping, which `Config` parses strictly, and arguments for `configure`."""

from dataclasses import dataclass

from torch import nn

from threestudio.utils.misc import get_device


class Updateable:
    def update_step(self, epoch, global_step, on_load_weights=False):
        pass


class BaseObject(Updateable):
    @dataclass
    class Config:
        pass

    def __init__(self, cfg=None, *args, **kwargs):
        self.cfg, self.device = self.Config(**(cfg or {})), get_device()
        self.configure(*args, **kwargs)

    def configure(self, *args, **kwargs):
        pass


class BaseModule(nn.Module, Updateable):
    @dataclass
    class Config:
        weights: str | None = None

    def __init__(self, cfg=None, *args, **kwargs):
        super().__init__()
        self.cfg, self.device = self.Config(**(cfg or {})), get_device()
        self.configure(*args, **kwargs)

    def configure(self, *args, **kwargs):
        pass
