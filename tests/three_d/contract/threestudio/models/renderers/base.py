from dataclasses import dataclass

from threestudio.utils.base import BaseModule


class Renderer(BaseModule):
    @dataclass
    class Config(BaseModule.Config):
        radius: float = 1.0

    def configure(self, geometry, material, background):
        self.parts = (geometry, material, background)  # a tuple, so that they do not become submodules of the renderer

    geometry = property(lambda self: self.parts[0])
    material = property(lambda self: self.parts[1])
    background = property(lambda self: self.parts[2])


class VolumeRenderer(Renderer):
    pass
